"""``generate``: the rows it writes, what a killed command goes on with, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.cli import main as cli
from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.generate import _Progress, main
from rlhf_lightning.preferences.partial import PartialAnswers, Place
from rlhf_lightning.rollout.engine import RolloutEngine

PROMPTS = ["a cat", "the red dog likes", "what is a fish ?", "hello", "who sees the bird", "one two three", "why not"]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "wanted": "cat", "policies": "mine"} for text in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def other_policy_dir(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with another head, and without a chat template."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    tokenizer.chat_template = None
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generate(prompts: Path, out: Path, *more: str, policies: list[str]) -> list[dict[str, Any]]:
    arguments = ["--policies", *policies, "--prompts", str(prompts), "--max_new_tokens", "6", "--out", str(out)]
    assert main([*arguments, *more]) == 0
    assert not out.with_name(f"{out.name}.partial").exists()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_have_all_answers_and_keep_the_prompts_own_columns(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, other_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = generate(prompts, tmp_path / "out.jsonl", policies=[f"sft={tiny_policy_dir}", f"other={other_policy_dir}"])
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["id"] for row in rows] == [str(number) for number in range(len(PROMPTS))]
    for row in rows:
        assert list(row) == ["id", "prompt", "completions", "policies", "wanted", "input_policies"]
        assert row["wanted"] == "cat"
        assert row["input_policies"] == "mine"
        assert len(row["completions"]) == len(row["policies"])
        assert len({text.strip() for text in row["completions"]}) == len(row["completions"])
        given = Counter(name for names in row["policies"] for name in names.split("+"))
        assert given["sft"] <= 4
        assert given["other"] <= 4
    assert sum(len(row["completions"]) for row in rows) > 6 * len(PROMPTS)  # the policies do not repeat themselves
    printed = capsys.readouterr().out
    assert "column 'policies' is written as 'input_policies'" in printed
    assert "sft: 28 of 28 answers, " in printed
    assert "tokens/s" in printed
    assert "out.jsonl: 7 of 7 prompts; left out: none" in printed


def test_chats_and_their_ids_come_back(
    tmp_path: Path, tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "bye"},
        {"role": "user", "content": "why"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"id": 7, "prompt": turns, "chosen": "yes", "rejected": "no"}) + "\n")
    (row,) = generate(path, tmp_path / "out.jsonl", policies=[str(tiny_policy_dir)])
    assert row["id"] == "7"
    assert row["prompt"] == turns
    assert set(row) == {"id", "prompt", "completions", "policies"}
    assert "keys that are not written to the output: chosen, rejected" in capsys.readouterr().out


def test_the_result_does_not_depend_on_batches_nor_on_the_other_policies(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, other_policy_dir: Path
) -> None:
    both = [f"sft={tiny_policy_dir}", f"other={other_policy_dir}"]
    rows = generate(prompts, tmp_path / "a.jsonl", policies=both)
    assert generate(prompts, tmp_path / "b.jsonl", "--batch_size", "2", policies=both) == rows
    assert generate(prompts, tmp_path / "c.jsonl", "--seed", "1", policies=both) != rows

    def of(rows: list[dict[str, Any]], policy: str) -> list[set[str]]:
        return [
            {text for text, names in zip(row["completions"], row["policies"], strict=True) if policy in names}
            for row in rows
        ]

    assert of(generate(prompts, tmp_path / "d.jsonl", policies=both[1:]), "other") == of(rows, "other")
    some = generate(prompts, tmp_path / "e.jsonl", "--max_prompts", "3", policies=both)
    assert some == [row for row in rows if row["prompt"] in [each["prompt"] for each in some]]


def test_two_names_of_one_model_answer_from_other_draws(tmp_path: Path, prompts: Path, tiny_policy_dir: Path) -> None:
    rows = generate(
        prompts, tmp_path / "out.jsonl", "--count", "1", policies=[f"a={tiny_policy_dir}", f"b={tiny_policy_dir}"]
    )
    assert all(len(row["completions"]) == 2 for row in rows)


def test_the_order_of_the_answers_does_not_tell_the_policy(
    tmp_path: Path, tiny_policy_dir: Path, other_policy_dir: Path
) -> None:
    """Each policy is first in about half of 200 rows: 5 standard deviations are 35."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a cat", "number": i}) + "\n" for i in range(200)))
    policies = [f"sft={tiny_policy_dir}", f"other={other_policy_dir}"]
    rows = generate(path, tmp_path / "out.jsonl", "--count", "1", "--batch_size", "100", policies=policies)
    pairs = [row["policies"] for row in rows]
    assert len(pairs) > 190
    assert abs(sum(pair[0] == "sft" for pair in pairs) - len(pairs) / 2) < 35


def test_equal_answers_stand_once_with_all_who_gave_them(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, other_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy policies say their one answer: two names of one model the same, the other model another."""
    greedy = ("--count", "1", "--temperature", "0")
    a, b, c = f"a={tiny_policy_dir}", f"b={tiny_policy_dir}", f"c={other_policy_dir}"
    rows = generate(prompts, tmp_path / "out.jsonl", *greedy, policies=[a, c, b])
    assert rows
    for row in rows:
        assert sorted(row["policies"]) == ["a+b", "c"]
        assert len(row["completions"]) == 2
    assert len(rows) == len(PROMPTS) or "all answers the same" in capsys.readouterr().out
    with pytest.raises(InputError, match="all answers to each prompt are the same"):
        generate(prompts, tmp_path / "same.jsonl", *greedy, policies=[a, b])
    assert list(tmp_path.glob("same*")) == []


@pytest.mark.parametrize("narrow", [("--top_k", "1"), ("--top_p", "0.000001"), ("--temperature", "0.00001")])
def test_narrow_sampling_leaves_one_answer(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, narrow: tuple[str, str]
) -> None:
    with pytest.raises(InputError, match="all answers to each prompt are the same"):
        generate(prompts, tmp_path / "out.jsonl", *narrow, policies=[str(tiny_policy_dir)])


def test_rows_with_one_answer_are_left_out_and_counted(
    tmp_path: Path,
    prompts: Path,
    tiny_policy_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = RolloutEngine.rollout

    def rollout(self: Any, policy: Any, batch: Any, *more: Any) -> Any:
        result = real(self, policy, batch, *more)
        for place, row in enumerate(batch.rows.tolist()):
            if row in (1, 3):
                result.responses[place] = "equal" + " " * more[1].iteration * (row == 1)
        return result

    monkeypatch.setattr(RolloutEngine, "rollout", rollout)
    rows = generate(prompts, tmp_path / "out.jsonl", policies=[str(tiny_policy_dir)])
    assert [row["id"] for row in rows] == ["0", "2", "4", "5", "6"]
    assert "out.jsonl: 5 of 7 prompts; left out: all answers the same 2" in capsys.readouterr().out


# Stopped and continued


def test_a_killed_command_goes_on_to_the_same_bytes(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, other_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = [f"sft={tiny_policy_dir}", f"other={other_policy_dir}"]
    small = ("--batch_size", "2", "--max_new_tokens", "40")
    generate(prompts, tmp_path / "whole.jsonl", *small, policies=policies)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    arguments = ["--policies", *policies, "--prompts", str(prompts), "--out", str(out), *small]
    slow = (
        "import time; from rlhf_lightning.preferences import candidates, generate\n"
        "real = candidates.candidate_rollouts\n"
        "def slowly(*given):\n"
        "    for each in real(*given):\n"
        "        time.sleep(0.1)\n"
        "        yield each\n"
        "candidates.candidate_rollouts = slowly\n"
        f"generate.main({arguments!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with partial.open("ab") as file:  # as if the kill had come within a write
        file.write('{"policy": "sft", "number": 3, "text": "ä'.encode()[:-1])
    capsys.readouterr()
    with pytest.raises(InputError, match=r"temperature was 1\.0, now 0\.5.*give its options to go on, or delete"):
        main([*arguments, "--temperature", "0.5"])
    kept = partial.read_bytes()
    assert main(arguments) == 0
    assert "answers are in" in capsys.readouterr().out
    assert kept.count(b"\n") >= 7
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()
    with pytest.raises(InputError, match="exists already"):
        main(arguments)


def test_nothing_is_sampled_twice(
    tmp_path: Path,
    prompts: Path,
    tiny_policy_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = RolloutEngine.rollout, []

    def stopping(self: Any, policy: Any, batch: Any, *more: Any) -> Any:
        calls.append(batch.rows.tolist())
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, policy, batch, *more)

    monkeypatch.setattr(RolloutEngine, "rollout", stopping)
    one = ("--batch_size", "3", "--count", "4")
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, tmp_path / "out.jsonl", *one, policies=[str(tiny_policy_dir)])
    assert "stopped: 13 answers are in " in capsys.readouterr().out
    generate(prompts, tmp_path / "out.jsonl", *one, policies=[str(tiny_policy_dir)])
    assert len(calls) == 12 + 1  # three batches, four answers each, and the one that was stopped
    assert calls[6] == calls[5]


def test_the_model_and_the_prompts_are_part_of_what_goes_on(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, other_policy_dir: Path
) -> None:
    path = tmp_path / "out.jsonl.partial"
    arguments = ["--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--max_new_tokens", "4"]
    with PartialAnswers(path, {"seed": 0}) as partial:
        partial.add({Place("a", 0, 0): "text"})
    with pytest.raises(InputError, match=r"count was None, now 4, .*policy a was None, .*prompts was None"):
        main(["--policies", f"a={tiny_policy_dir}", *arguments])


def test_a_partial_file_is_one_process_at_a_time_and_its_lines_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "answers.partial"
    with PartialAnswers(path, {"seed": 0}) as partial:
        partial.add({Place("a", 0, 0): "x\u2028y"})
        with pytest.raises(InputError, match="another process"):
            PartialAnswers(path, {"seed": 0})
    with PartialAnswers(path, {"seed": 0}) as partial:
        assert partial.texts == {Place("a", 0, 0): "x\u2028y"}
    for torn in ('{"policy": "a', "{"):
        path.write_text(path.read_text() + torn)
        with PartialAnswers(path, {"seed": 0}) as partial:
            partial.add({Place("a", 1, 0): "z"})
    with PartialAnswers(path, {"seed": 0}) as partial:
        assert partial.texts == {Place("a", 0, 0): "x\u2028y", Place("a", 1, 0): "z"}
    path.write_text(path.read_text() + "no\n")
    with pytest.raises(InputError, match=r"answers\.partial:5: .*delete the file"):
        PartialAnswers(path, {"seed": 0})
    foreign = tmp_path / "foreign.partial"
    foreign.write_text("notes")
    with pytest.raises(InputError, match=r"foreign\.partial:1: "):
        PartialAnswers(foreign, {"seed": 0})
    assert foreign.read_text() == "notes"
    with PartialAnswers(tmp_path / "unused.partial", {}):
        pass
    assert not (tmp_path / "unused.partial").exists()


def test_progress_is_said_every_ten_seconds_with_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = _Progress("sft", 4, 10, clock=lambda: now)
    progress.step(3, 64)
    for now in (5.0, 10.0, 12.0):  # noqa: B007  the clock reads it
        progress.step(5, 64)
    progress.batch(3, 240)
    now = 20.0
    progress.batch(2, 160)
    now = 21.0
    progress.batch(1, 20)
    progress.end()
    assert capsys.readouterr().out.splitlines() == [
        "sft: 4 of 10 answers; token 5 of up to 64",
        "sft: 9 of 10 answers, 20 tokens/s",
        "sft: 10 of 10 answers, 20 tokens/s in 21.0 s",
    ]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "a={policy}", "a={policy}"], "two are named 'a'"),
        (["--policies", "={policy}"], "expected NAME=DIR"),
        (["--policies", "a="], "expected NAME=DIR"),
        (["--policies", "a+b={policy}"], "a plus joins names"),
        (["--policies", "a={folder}/missing"], "missing: no such folder"),
        (["--policies", "a={policy}", "--count", "1"], "nothing to compare"),
        (["--policies", "a={policy}", "--count", "0"], "--count 0"),
        (["--policies", "a={policy}", "--temperature", "0"], "--temperature 0 all answers"),
        (["--policies", "a={policy}", "--temperature", "1e-13"], "--temperature 1e-13: .*from 1e-12"),
        (["--policies", "a={policy}", "--temperature", "inf"], "--temperature inf"),
        (["--policies", "a={policy}", "--top_p", "0"], "--top_p 0"),
        (["--policies", "a={policy}", "--top_k", "-1"], "--top_k -1"),
        (["--policies", "a={other}", "--chat"], "--chat: the tokenizer of .* has no chat template"),
        (["--policies", "a={other}", "--prompts", "{folder}/chats.jsonl"], "chats.jsonl:1: .*no chat template"),
        (["--policies", "a={policy}", "--prompts", "{folder}/no.jsonl"], "no.jsonl"),
        (["--policies", "a={policy}", "--prompts", "{folder}/texts.jsonl"], "texts.jsonl:1: .*no prompt to answer"),
        (["--policies", "a={policy}", "--prompts", "{folder}/ids.jsonl"], "ids.jsonl:2: key 'id': 'x' is also"),
        (["--policies", "a={policy}", "--max_new_tokens", "500"], "positions .*lower --max_new_tokens"),
        (["--policies", "a={policy}", "--out", "{policy}/out.jsonl"], "stands in the model folder"),
        (["--policies", "a={policy}", "--out", "{folder}"], "this is a folder"),
        (["--policies", "a={policy}", "--out", "{prompts}"], "this command reads it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    prompts: Path,
    tiny_policy_dir: Path,
    other_policy_dir: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a cat"}\n')
    (tmp_path / "ids.jsonl").write_text('{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n')
    (tmp_path / "chats.jsonl").write_text('{"prompt": [{"role": "user", "content": "hello"}]}\n')
    before = sorted(tmp_path.iterdir())
    places = {"policy": tiny_policy_dir, "other": other_policy_dir, "folder": tmp_path, "prompts": prompts}
    given = [option.format(**places) for option in options]
    first = [] if "--prompts" in given else ["--prompts", str(prompts)]
    assert cli(["generate", *first, "--out", str(tmp_path / "out.jsonl"), "--max_new_tokens", "4", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert sorted(tmp_path.iterdir()) == before
