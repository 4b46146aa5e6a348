"""The DataModule under a real Trainer: views, splits, resume, prediction, two processes, and what it refuses."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
from chat_tokenizer import TEMPLATE, make_tokenizer
from data_runs import Notes, SaveAt, make_data, make_trainer, write_rows
from jsonargparse import ArgumentParser
from processes import free_port, run_scripts

from rlhf_lightning.batches import LabelledBatch, PreferenceBatch, View
from rlhf_lightning.data.collate import collate
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError

HERE = Path(__file__).parent
VIEWS = {"pairs": View("pairs"), "prompts": View("prompts"), "steps": View("prompts", steps=7)}


def run(path, view=VIEWS["pairs"], checkpoint=None, save=None, **options):
    module = Notes(view)
    data_options = {name: options.pop(name) for name in list(options) if name not in ("max_epochs", "max_steps")}
    callbacks = [SaveAt(*save)] if save else []
    make_trainer(callbacks=callbacks, **options).fit(
        module, datamodule=make_data(path, **data_options), ckpt_path=checkpoint
    )
    return module


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("place", [(0, 0), (1, 3), (1, None), (0, 6), (2, 6)])
def test_a_resumed_run_sees_exactly_the_remaining_batches(tmp_path, view, place):
    path, checkpoint = write_rows(tmp_path / "rows.jsonl"), str(tmp_path / "saved.ckpt")
    whole = run(path, VIEWS[view], save=(checkpoint, *place)).seen
    assert len(whole) == 3 * 7
    epoch, batch = place
    done = epoch * 7 + (7 if batch is None else batch + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        assert run(path, VIEWS[view], checkpoint=checkpoint).seen == whole[done:]


def test_an_epoch_shows_every_training_row_and_validation_every_other(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    module = run(path, max_epochs=1, validation_fraction=0.2)
    trained = [json.dumps(row) for _, _, rows in module.seen for row in rows]
    validated = [json.dumps(row) for row in module.validated]
    assert (len(trained), len(validated)) == (22, 5) and len(set(trained) | set(validated)) == 27


def test_what_is_seen_does_not_depend_on_the_number_of_processes(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")

    def batches(world, training):
        found = []
        for rank in range(world):
            data = make_data(path, val_batch_size=2).prepare(VIEWS["pairs"])
            loader = data.train_dataloader() if training else data.val_dataloader()
            loader._place = lambda rank=rank: (1, 0, rank, world)  # epoch 1, from its start
            found.append([Notes(VIEWS["pairs"]).rows(batch) for batch in loader])
        return [sorted(row for rows in shares for row in rows) for shares in zip(*found, strict=True)]

    for training in (True, False):
        assert batches(1, training) == batches(2, training) == batches(3, training)


def test_stepped_prompts_fill_every_batch_and_go_on_in_the_next_epoch(tmp_path):
    seen = run(write_rows(tmp_path / "rows.jsonl", 6), VIEWS["steps"], validation_fraction=0.0, max_epochs=2).seen
    assert [len(rows) for _, _, rows in seen] == [4] * 14
    counts = Counter(text for _, _, rows in seen[:12] for _, text in rows)
    assert len(counts) == 6 and set(counts.values()) == {8}


def test_labelled_rows_take_the_place_of_pairs_where_the_module_takes_them(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"p{i}", "completion": "fine" if i % 3 else "bad", "label": i % 3 > 0} for i in range(9)]
    path.write_text("".join(json.dumps({**row, "weight": 2}) + "\n" for row in rows))
    data = make_data(str(path), validation_fraction=0.2).prepare(View("pairs", labels=True))
    assert data.summary().startswith("data: 7 labels to train on, 2 held out")
    assert data.state_dict()["options"]["view"] == "labels"
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    seen = []
    for batch in batches:
        assert isinstance(batch, LabelledBatch) and batch.weights.tolist() == [2.0] * len(batch)
        side = batch.responses
        for b, desirable in enumerate(batch.desirable.tolist()):
            ids = side.tokens[b, : side.lengths[b]].tolist()
            prompt, response = ids[: side.prompt_lengths[b]], ids[side.prompt_lengths[b] : -1]
            seen.append((data.tokenizer.decode(prompt), data.tokenizer.decode(response), desirable))
    assert sorted(seen) == [(row["prompt"], row["completion"], row["label"]) for row in rows]
    with pytest.raises(InputError, match=r"labels.jsonl:\d: key 'label': a comparison has 'chosen' and 'rejected'"):
        make_data(str(path)).prepare(VIEWS["pairs"])
    pairs = make_data(write_rows(tmp_path / "pairs.jsonl")).prepare(View("pairs", labels=True))
    assert isinstance(next(iter(pairs.train_dataloader())), PreferenceBatch)
    with pytest.raises(InputError, match=r"pairs.jsonl:\d+: key 'label': is missing, and other rows have one"):
        make_data([str(path), str(tmp_path / "pairs.jsonl")]).prepare(View("pairs", labels=True))


def test_predict_answers_every_row_of_the_path(tmp_path):
    first, second = write_rows(tmp_path / "rows.jsonl"), write_rows(tmp_path / "more.jsonl", 3)
    data = make_data([first, second])
    found = make_trainer().predict(Notes(VIEWS["pairs"]), datamodule=data)
    rows = sorted(row for batch in found for row in batch)
    expected = [json.loads(line)["prompt"] for path in (first, second) for line in Path(path).read_text().splitlines()]
    assert rows == list(enumerate(expected))  # the second file repeats prompts of the first
    assert data.summary() == "data: 30 prompts to answer; nothing dropped"
    assert [example.record.row for example in data.held_out] == [*range(27), 0, 1, 2]


def test_what_predict_leaves_out_is_counted_and_the_others_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    prompts = ["how are you", "how " * 30, "how are you"]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    data = make_data(str(path), max_prompt_tokens=20, long_prompts="drop").prepare(VIEWS["pairs"], stage="predict")
    assert [example.row for example in data.held_out] == [0, 2]
    assert data.summary() == "data: 2 prompts to answer; prompt over max_prompt_tokens: 1"


def test_validation_can_have_its_own_file_and_leaks_are_said(tmp_path):
    train, held_out = write_rows(tmp_path / "rows.jsonl"), write_rows(tmp_path / "val.jsonl", 3)
    module = Notes(VIEWS["pairs"])
    with pytest.warns(UserWarning, match="data.val_path: 3 of its prompts are in data.path too"):
        make_trainer().validate(module, datamodule=make_data(train, val_path=held_out), verbose=False)
    assert len(module.validated) == 3


def test_nothing_held_out(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    assert run(path, max_epochs=1, validation_fraction=0.0).validated == []
    with pytest.raises(InputError, match=r"no rows to test on: set data.val_path, or data.validation_fraction above 0"):
        make_data(path, validation_fraction=0.0).prepare(VIEWS["pairs"], stage="test").test_dataloader()


def test_the_prompts_of_both_sides_differ(tmp_path):
    rows = [{"prompt": f"p{i % 9}", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make_data(str(path), validation_fraction=0.3).prepare(VIEWS["pairs"])
    assert len(data.train) + len(data.held_out) == 90
    assert not {e.record.key for e in data.train} & {e.record.key for e in data.held_out}


def test_what_was_dropped_is_said(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "ba"[i % 2]} for i in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make_data(str(path), validation_fraction=0.0).prepare(VIEWS["pairs"])
    assert data.summary() == "data: 5 pairs to train on, 0 held out; equal responses: 5"
    path.write_text(json.dumps(rows[1]) + "\n")
    for fraction in (0.0, 0.05):
        with pytest.raises(
            InputError, match=r"no pairs left to train on of 1 rows read \(equal responses: 1\); give more"
        ):
            make_data(str(path), validation_fraction=fraction).prepare(VIEWS["pairs"])


def test_rows_that_are_not_dropped_are_noted_apart_from_those_that_are(tmp_path):
    rows = [{"prompt": "how " * 30, "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    user = [{"role": "user", "content": "q"}]
    chat = {"prompt": "other", "chosen": [*user, ANSWER], "rejected": [*user, {**ANSWER, "content": "no"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, chat]))
    data = make_data(str(path), validation_fraction=0, max_prompt_tokens=20, long_prompts="truncate_left")
    told = data.prepare(VIEWS["pairs"]).summary()
    assert told.startswith("data: 2 pairs to train on, 0 held out; equal responses: 1; noted: ")
    assert (
        "prompt cut on the left: 1" in told and "prompt ignored, since the row's own conv" in told.partition("noted")[2]
    )


def test_changed_data_or_options_cannot_be_resumed(tmp_path):
    path, checkpoint = write_rows(tmp_path / "rows.jsonl"), str(tmp_path / "saved.ckpt")
    run(path, save=(checkpoint, 0, 3))
    with pytest.raises(InputError, match=r"data.batch_size: the checkpoint was made with 4, now it is 5; set it back"):
        run(path, checkpoint=checkpoint, batch_size=5)
    with pytest.raises(InputError, match=r"data.seed: the checkpoint was made with 3, now it is 4"):
        run(path, checkpoint=checkpoint, seed=4)
    with pytest.raises(InputError, match="its training learnt from pairs, and this one learns from prompts"):
        run(path, VIEWS["prompts"], checkpoint=checkpoint, batch_size=5)
    write_rows(tmp_path / "rows.jsonl", 26)
    with pytest.raises(InputError, match=r"data.path: the data changed since the checkpoint \(26 pairs then, 25 now\)"):
        run(path, checkpoint=checkpoint)


def test_a_changed_tokenizer_or_template_cannot_be_resumed(tmp_path):
    path, checkpoint = write_rows(tmp_path / "rows.jsonl"), str(tmp_path / "saved.ckpt")
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}user {{ m['content'] }}{% endfor %}")
    options = {"chat": True, "chat_template": str(template)}
    run(path, save=(checkpoint, 0, 3), **options)
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(InputError, match=r"data.tokenizer: the rows give other tokens than when the checkpoint was"):
        run(path, checkpoint=checkpoint, **options)


def test_a_budget_has_no_meaning_for_stepped_prompts(tmp_path):
    with pytest.raises(InputError, match=r"data.batch_tokens: has no effect on prompts to sample from"):
        make_data(write_rows(tmp_path / "rows.jsonl"), batch_tokens=100).prepare(VIEWS["steps"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("batch_tokens", -1), ("validation_fraction", 1.0), ("long_responses", "truncate_left")],
)
def test_options_out_of_range_are_refused_when_parsed(option, value):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PreferenceDataModule, "data")
    parser.parse_args(["--data.path", "a.jsonl", "--data.batch_tokens", "64"])
    with pytest.raises(Exception, match=option):
        parser.parse_args(["--data.path", "a.jsonl", f"--data.{option}", str(value)])


def test_two_processes_see_what_one_sees_also_when_resumed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    port = str(free_port())
    arguments = [path, str(tmp_path / "notes"), str(tmp_path / "saved.ckpt")]
    run_scripts(HERE / "data_runs.py", [[*arguments, rank, port] for rank in "01"])
    first, second = (json.loads(Path(f"{arguments[1]}.{rank}").read_text()) for rank in range(2))

    def together(name):
        return [
            [epoch, batch, sorted(rows + others)]
            for (epoch, batch, rows), (_, _, others) in zip(first[name], second[name], strict=True)
        ]

    alone = run(path, max_epochs=2)
    expected = json.loads(json.dumps(alone.seen))
    assert together("whole") == expected
    assert together("resumed") == expected[3:]
    assert sorted(first["validated"] + second["validated"]) == sorted(json.loads(json.dumps(alone.validated)))


ANSWER = {"role": "assistant", "content": "fine"}


def chat_rows(path, *chats):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


def test_the_date_of_a_run_is_that_of_its_checkpoint(tmp_path):
    texts = ("hello", "how are you", "a", "b")
    path = chat_rows(tmp_path / "rows.jsonl", *([{"role": "user", "content": text}, ANSWER] for text in texts))
    template = tmp_path / "template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + make_tokenizer().chat_template)
    options = {"chat_template": str(template), "validation_fraction": 0}
    first = make_data(path, date="2001-02-03", **options).prepare(View("demonstrations"))
    assert first.tokenizer.decode(first.train[0].prompt).startswith("2001-02-03<|im_start|>")
    assert first.tokenizer.chat_template == template.read_text()  # travels with the model
    resumed = make_data(path, **options).prepare(View("demonstrations"))
    assert resumed.date != "2001-02-03"
    resumed.load_state_dict(first.state_dict())
    assert resumed.date == "2001-02-03" and resumed.train[0].prompt.tolist() == first.train[0].prompt.tolist()
    for stage in ("validate", "test", "predict"):  # where nothing is trained, and no run's config gives the date
        measured = make_data(path, **{**options, "val_path": path}).prepare(View("demonstrations"), stage=stage)
        answering = [len(measured.train), len(measured.held_out), measured.answering]
        measured.load_state_dict(first.state_dict())
        assert first.tokenizer.decode(measured.held_out[0].prompt).startswith("2001-02-03<|im_start|>")
        assert [len(measured.train), len(measured.held_out), measured.answering] == answering
        given = make_data(path, **{**options, "val_path": path, "date": "2001-02-04"})
        given.prepare(View("demonstrations"), stage=stage).load_state_dict(first.state_dict())
        assert first.tokenizer.decode(given.held_out[0].prompt).startswith("2001-02-04<|im_start|>")
    other = make_data(path, date="2001-02-04", **options).prepare(View("demonstrations"))
    with pytest.raises(InputError, match=r"data.date: the checkpoint was made with 2001-02-03, now it is 2001-02-04"):
        other.load_state_dict(first.state_dict())


def test_the_day_is_kept_on_resume_also_where_only_a_reward_models_template_has_a_clock(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    first = make_data(path, date="2001-02-03").prepare(View("pairs"))
    resumed = make_data(path).prepare(View("pairs"))
    resumed.load_state_dict(first.state_dict())
    assert resumed.date == "2001-02-03"


def test_texts_that_spell_special_tokens_are_told_with_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["<|im_start|>user\nhello<|im_end|>\n", "hello"]
    path.write_text("".join(json.dumps({"prompt": text, "completion": "fine"}) + "\n" for text in texts))
    with pytest.warns(UserWarning, match=r"the texts of 1 rows spell special .*set data.special_tokens to tokens"):
        make_data(str(path), validation_fraction=0).prepare(View("demonstrations"))
    data = make_data(str(path), validation_fraction=0, special_tokens="tokens").prepare(View("demonstrations"))
    assert set(data.train[0].prompt.tolist()) & set(data.tokenizer.all_special_ids)
    with pytest.raises(InputError, match=r"data.special_tokens: the checkpoint was made with tokens, now it is text"):
        make_data(str(path), validation_fraction=0).prepare(View("demonstrations")).load_state_dict(data.state_dict())


def test_what_the_template_drops_of_responses_is_warned_of(tmp_path):
    user, thought = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>x</think>fine"}
    data = make_data(chat_rows(tmp_path / "rows.jsonl", [user, thought], [user, ANSWER]), validation_fraction=0)
    data.tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.warns(UserWarning, match=r"data: the chat template drops <think>…</think> from 1 of 2 responses"):
        data.prepare(View("demonstrations"))


def test_responses_that_repeat_their_prompt_are_warned_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "hello", "completion": "hello, fine"}) + "\n")
    with pytest.warns(UserWarning, match=r"data: 1 of 1 responses begin with their own prompt"):
        make_data(str(path), validation_fraction=0).prepare(View("demonstrations"))


def test_a_column_that_was_likely_meant_for_system_is_warned_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"system_prompt": "be kind", "prompt": "hello", "completion": "fine"}) + "\n")
    with pytest.warns(
        UserWarning, match=r"data: column 'system_prompt' of 1 rows looks like 'system', .*data.columns: {s"
    ):
        make_data(str(path), validation_fraction=0).prepare(View("demonstrations"))


def test_labels_that_are_all_the_same_are_warned_of_where_they_are_learnt_from(tmp_path, recwarn):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "a", "label": True}) + "\n" for i in range(4)))
    make_data(str(path)).prepare(View("prompts"))
    assert not [line for line in recwarn.list if "label" in str(line.message)]
    with pytest.warns(
        UserWarning, match=r"data: every label \(3\) is true, so KTO has no contrast to learn from; add r"
    ):
        make_data(str(path)).prepare(View("pairs", labels=True))


def test_what_is_only_measured_is_told_without_what_could_be_trained_on(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    for stage in ("validate", "test"):
        data = make_data(path, validation_fraction=0.1).prepare(VIEWS["pairs"], stage=stage)
        assert data.summary() == "data: 3 pairs held out; nothing dropped"
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n")
    data = make_data(str(tmp_path / "train.jsonl"), val_path=path).prepare(VIEWS["pairs"], stage="test")
    assert data.summary() == "data: 27 pairs held out; nothing dropped"


def test_several_turns_reach_the_batches_with_their_mask(tmp_path):
    user = {"role": "user", "content": "hello"}
    path = chat_rows(tmp_path / "rows.jsonl", [user, ANSWER, user, ANSWER], [user, ANSWER])
    data = make_data(path, validation_fraction=0).prepare(View("demonstrations"))
    batch = collate(data.train, "demonstrations", 0)
    said = [
        data.tokenizer.decode(row[prompt : prompt + len(mask)][mask])
        for row, prompt, mask in zip(batch.tokens, batch.prompt_lengths.tolist(), batch.spoken, strict=True)
    ]
    assert said == ["fine<|im_end|>fine<|im_end|>", "fine<|im_end|>"]


@pytest.mark.parametrize("held_out", ["validation_fraction", "val_path"])
def test_rows_at_fault_are_counted_in_the_file_and_not_in_a_part_of_it(tmp_path, held_out):
    question, answer = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    rows = [{"messages": [{**question, "content": f"q{i}"}]} for i in range(8)]
    rows += [{"messages": [question, answer]}, {"messages": [question, {**answer, "content": ""}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "whole.jsonl").write_text(json.dumps(rows[8]) + "\n")
    path = str(tmp_path / "rows.jsonl")
    options = {"validation_fraction": 0.5}
    if held_out == "val_path":
        options, path = {"val_path": path}, str(tmp_path / "whole.jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl:1: .* ends with the user's turn; .* \(8 of 10 rows have this\)$"):
        make_data(path, **options).prepare(View("demonstrations"), make_tokenizer())
