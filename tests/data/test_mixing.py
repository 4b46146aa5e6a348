"""Weights of files: exact counts in every epoch, every row in its turn, the same batches after a resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from data_runs import make_data

from rlhf_lightning.batches import View
from rlhf_lightning.errors import InputError

PAIRS = View("pairs")


def write_file(path, name, count):
    rows = [{"prompt": f"{name}{i}", "chosen": "a" * (1 + i % 7), "rejected": "no"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(tmp_path):
    return write_file(tmp_path / "a.jsonl", "a", 10), write_file(tmp_path / "b.jsonl", "b", 10)


def prompts(data, epoch, start=0, rank=0, world=1):
    """The prompts of each batch from ``start`` on."""
    loader = data.train_dataloader()
    loader._place = lambda: (epoch, start, rank, world)
    found = []
    for batch in loader:
        side = batch.chosen
        rows = zip(side.tokens.tolist(), side.prompt_lengths.tolist(), batch.weights.tolist(), strict=True)
        found.append([data.tokenizer.decode(ids[:n]) for ids, n, weight in rows if weight > 0])
    assert len(found) == len(loader) - start
    return found


@pytest.mark.parametrize("batch_tokens", [None, 60])
def test_each_row_comes_as_often_as_its_file_weighs(tmp_path, batch_tokens):
    a, b = files(tmp_path)
    data = make_data({a: 2.3, b: 0.5}, validation_fraction=0.0, batch_tokens=batch_tokens).prepare(PAIRS)
    total: Counter[str] = Counter()
    for epoch in range(10):
        counts = Counter(text for batch in prompts(data, epoch) for text in batch)
        of_a = sorted(n for text, n in counts.items() if text[0] == "a")
        assert of_a == [2] * 7 + [3] * 3  # 10 rows, 2 times each, and 3 of them once more
        assert sorted(n for text, n in counts.items() if text[0] == "b") == [1] * 5
        total += counts
        if epoch % 2:  # in every two epochs each of b came once
            assert {total[f"b{i}"] for i in range(10)} == {(epoch + 1) // 2}
    assert prompts(data, 3) != prompts(data, 4) and prompts(data, 3) == prompts(data, 3)
    assert prompts(data, 3, start=2) == prompts(data, 3)[2:]
    shares = [prompts(data, 3, rank=rank, world=2) for rank in range(2)]
    assert [sorted(x + y) for x, y in zip(*shares, strict=True)] == [sorted(batch) for batch in prompts(data, 3)]


def test_weights_of_one_change_nothing(tmp_path):
    a, b = files(tmp_path)
    plain, mixed = (make_data(path).prepare(PAIRS) for path in ([a, b], {a: 1, b: 1}))
    assert prompts(plain, 1) == prompts(mixed, 1)


def test_sampled_prompts_are_mixed_too(tmp_path):
    a, b = files(tmp_path)
    data = make_data({a: 1, b: 0.5}, validation_fraction=0.0).prepare(View("prompts", steps=15))
    batches = list(data.train_dataloader())
    assert all(len(set(batch.rows.tolist())) == 4 for batch in batches)
    counts = Counter(text for batch in batches for text in batch.prompts)  # 60 places, 15 in a pass: 4 passes
    assert {counts[f"a{i}"] for i in range(10)} == {4} and {counts[f"b{i}"] for i in range(10)} == {2}


def test_other_weights_cannot_be_resumed(tmp_path):
    a, b = files(tmp_path)
    data = make_data({a: 1, b: 0.5}).prepare(PAIRS)
    with pytest.raises(InputError, match=r"data.weights|data.path: the checkpoint was made with \[1.0, 0.5\], now"):
        make_data({a: 1, b: 2}).prepare(PAIRS).load_state_dict(data.state_dict())


def test_weights_that_mean_nothing_are_refused(tmp_path):
    a, b = files(tmp_path)
    for path, message in (
        ({a: 1, b: 0}, "a weight of 0; give a number above 0"),
        ({a: 1, b: 0.01}, "a weight of 0.01 takes none of 10 rows"),
        (f"{{{a}: -1}}", "weights are numbers above 0"),
    ):
        with pytest.raises(InputError, match=message):
            make_data(path, validation_fraction=0.0).prepare(PAIRS)


def test_a_file_of_which_no_row_is_left_is_told(tmp_path):
    a = write_file(tmp_path / "a.jsonl", "a", 10)
    again = write_file(tmp_path / "again.jsonl", "a", 10)  # its prompts are those of the first
    with pytest.warns(UserWarning, match=f"no row of {again} is left to train on, its weight has no effect"):
        make_data({a: 1, again: 3}, validation_fraction=0.0).prepare(View("prompts"))


@pytest.mark.parametrize(
    ("weight", "batch_size", "prompts"), [(1, 64, 54), (1, 55, 54), (1, 54, 0), (2, 108, 0), (2, 109, 108)]
)
def test_an_iteration_of_more_prompts_than_there_are_says_so(tmp_path, recwarn, weight, batch_size, prompts):
    path = write_file(tmp_path / "a.jsonl", "a", 57)
    data = make_data({path: weight}, batch_size=batch_size, validation_fraction=0.05)
    data.prepare(View("prompts", steps=3))
    said = [str(line.message) for line in recwarn.list if "each iteration takes" in str(line.message)]
    found = [Counter(batch.prompts) for batch in data.train_dataloader()]
    assert {sum(counts.values()) for counts in found} == {batch_size}
    if not prompts:
        assert not said
        return
    assert said == [
        f"data: each iteration takes data.batch_size {batch_size} prompts, and there are {prompts} to train on: at "
        f"least {batch_size - prompts} of them come again in it; lower it to {prompts}, or give more prompts"
    ]
    assert all(sum(counts.values()) - len(counts) >= batch_size - prompts for counts in found)
    data.prepare(View("prompts"))  # each once
    data.prepare(View("prompts", steps=3), stage="validate")
    assert len([line for line in recwarn.list if "each iteration" in str(line.message)]) == 1
