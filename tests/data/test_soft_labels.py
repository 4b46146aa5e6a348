"""Rows with a probability that ``chosen`` is preferred: taken the right way round, refused where nobody learns it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_lightning.batches import View
from rlhf_lightning.data.choices import check_fit
from rlhf_lightning.data.collate import collate
from rlhf_lightning.data.records import load_records
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import RewardModelModule

ROW = {"prompt": "the cat", "chosen": "mat", "rejected": "dog"}


def records(tmp_path: Path, *rows: dict, suffix: str = "jsonl"):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        names = list(rows[0])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_better_response_comes_first(tmp_path: Path, suffix: str) -> None:
    found = records(tmp_path, *({**ROW, "preference": p} for p in (0.8, 0.25, 0.5, 1)), suffix=suffix)
    assert [(row.responses, row.preference) for row in found.rows] == [
        (("mat", "dog"), 0.8),
        (("dog", "mat"), 0.75),
        (("mat", "dog"), 0.5),
        (("mat", "dog"), 1.0),
    ]
    assert found.rows[0].columns == {}
    assert found.noted["pair with a preference below 0.5, taken the other way round"] == 1


def test_batches_have_the_probabilities_only_where_a_pair_is_uncertain(tmp_path: Path, kept_tokenizer) -> None:
    encoder = Encoder(kept_tokenizer)
    soft, _ = encoder.encode(records(tmp_path, {**ROW, "preference": 0.75}, ROW).rows, "pairs")
    batch = collate(soft, "pairs", 0)
    assert batch.preferences.tolist() == [0.75, 1.0]
    assert batch.to("cpu").preferences.tolist() == [0.75, 1.0]
    hard, _ = encoder.encode(records(tmp_path, {**ROW, "preference": 1}, ROW).rows, "pairs")
    assert collate(hard, "pairs", 0).preferences is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"preference": 1.5}, r"rows\.jsonl:1: key 'preference': is 1\.5; give the probability from 0 to 1"),
        ({"preference": -0.1}, r"key 'preference': is -0\.1"),
        ({"preference": "a"}, r"key 'preference': must be a number, got text"),
        ({"preference": True}, r"key 'preference': must be a number, got true/false"),
        ({"preference": 0.7, "margin": 1}, r"key 'margin': stands beside 'preference'"),
    ],
)
def test_faulty_probabilities_are_one_line(tmp_path: Path, more: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        records(tmp_path, {**ROW, **more})


def test_methods_that_do_not_learn_them_refuse_them(tmp_path: Path) -> None:
    rows = records(tmp_path, ROW, {**ROW, "preference": 0.7}).rows
    for kind in ("pairs", "labels"):
        with pytest.raises(InputError, match=r"rows\.jsonl:2: key 'preference': is 0\.7, and only a reward model"):
            check_fit(rows if kind == "pairs" else rows[1:], "pairs", "data.columns", soft=False)
    check_fit(rows, "pairs", "data.columns", soft=True)
    check_fit(rows, "demonstrations", "data.columns", soft=False)  # SFT imitates the better one
    assert RewardModelModule.data_view == View("pairs", soft=True)


def test_the_fingerprint_sees_them(tmp_path: Path) -> None:
    prints = {records(tmp_path, {**ROW, "preference": p}).fingerprint() for p in (1, 0.8, 0.7)}
    assert len(prints) == 3
