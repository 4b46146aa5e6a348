"""``predict``: every row of every file is answered once, in order, under its own number and with its other columns."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.cli.predictions import _OURS, _others
from rlhf_lightning.data.kept_columns import free_names, plain
from rlhf_lightning.data.records import load_records

ROWS = [
    {"prompt": "what is two ?", "answer": "4", "tokens": 7, "input_row": "kept", "row": "mine"},
    {"prompt": "what is two ?", "answer": "four"},
    {"prompt": "what is two ? ", "answer": None, "nested": {"a": [1, None, "x\u2028y"]}},
    {"prompt": "what " * 40, "answer": "dropped"},
    {"prompt": "hello"},
    {"messages": [{"role": "user", "content": "hello"}], "id": 5},
    {"prompt": "hello", "chosen": "no", "rejected": "no", "margin": 0.5},  # of no use for training
]


@pytest.fixture
def options(tmp_path: Path, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row) for row in ROWS]
    Path("rows.jsonl").write_text("\n\n".join(lines) + "\n")  # blank lines count as lines, and not as rows
    with gzip.open("more.jsonl.gz", "wt") as file:
        file.write(lines[0] + "\n")
    Path("table.csv").write_text('prompt,answer\n"what is\ntwo ?",IV\nwhat is two ?,\n')
    options = ["--config", "sft.yaml", "--model.model", str(tiny_policy_dir), "--trainer.accelerator", "cpu"]
    options += ["--data.max_prompt_tokens", "20", "--data.long_prompts", "drop", "--model.sampling.max_new_tokens", "6"]
    return [*options, "--data.path", "[rows.jsonl, more.jsonl.gz, table.csv]"]


def answers(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_row_is_answered_with_its_number_and_columns(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *options, "--output", "a.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "9 prompts to answer; prompt over max_prompt_tokens: 1" in printed
    assert printed.splitlines()[-1] == "9 responses in a.jsonl (prompt over max_prompt_tokens: 1)"
    assert "column 'row' is written as 'input_input_row'" in printed
    rows = answers("a.jsonl")
    assert [(row["row"], row["where"]) for row in rows] == [
        *((0, "rows.jsonl:1"), (1, "rows.jsonl:3"), (2, "rows.jsonl:5"), (4, "rows.jsonl:9"), (5, "rows.jsonl:11")),
        *((6, "rows.jsonl:13"), (0, "more.jsonl.gz:1"), (0, "table.csv:2"), (1, "table.csv:4")),
    ]
    assert rows[0]["prompt"] == ROWS[0]["prompt"] and rows[0]["answer"] == "4"
    assert rows[0]["input_tokens"] == 7 and rows[0]["input_row"] == "kept" and rows[0]["input_input_row"] == "mine"
    assert 1 <= rows[0]["tokens"] <= 6
    assert rows[1]["answer"] == "four" and "nested" not in rows[1] and "id" not in rows[1]
    assert rows[2]["answer"] is None and rows[2]["nested"] == ROWS[2]["nested"]
    assert rows[4]["prompt"] == ROWS[5]["messages"] and rows[4]["id"] == 5
    assert "messages" not in rows[4]
    assert (rows[5]["chosen"], rows[5]["rejected"], rows[5]["margin"]) == ("no", "no", 0.5)
    # Rows of one prompt are drawn for one by one; five times the same would be one draw for all.
    same = [row["response"] for row in rows if row["prompt"] == ROWS[0]["prompt"]]
    assert len(same) == 4 and len(set(same)) > 1
    assert main(["predict", *options, "--data.val_batch_size", "2", "--output", "b.jsonl"]) == 0
    assert Path("b.jsonl").read_bytes() == Path("a.jsonl").read_bytes()


def test_what_predict_reads_is_not_written_over(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for output in ("rows.jsonl", "/dev/null", f"{options[3]}/config.json"):
        before = Path(output).read_bytes()
        assert main(["predict", *options, "--output", output]) == 2
        assert capsys.readouterr().err.startswith(f"error: --output {output}: this ")
        assert Path(output).read_bytes() == before


def test_columns_have_names_of_their_own() -> None:
    assert free_names({"a", "row", "input_row", "prompt"}, _OURS) == {
        **{"a": "a", "row": "input_input_row"},
        **{"input_row": "input_row", "prompt": "input_prompt"},
    }


def test_a_column_that_repeats_the_prompt_is_still_a_column(tmp_path: Path) -> None:
    rows = [
        {"prompt": "two and two?", "original": "two and two?"},
        {"question": "two and two?", "response_j": "4", "response_k": "5", "original": "two and two?"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, compared = map(_others, load_records(str(tmp_path / "rows.jsonl")).rows)
    assert plain == {"original": "two and two?"}
    assert compared == {"response_j": "4", "response_k": "5", "original": "two and two?"}


def test_columns_of_tables_become_json() -> None:
    assert plain(datetime.datetime(2026, 1, 2, 3, 4)) == "2026-01-02T03:04:00"
    assert plain({1: (decimal.Decimal("1.50"), float("nan"), True, 2)}) == {"1": ["1.50", None, True, 2]}
    with pytest.raises(TypeError, match="bytes"):
        plain([b"x"])
