"""Candidates: the same after any stop, blind to whoever judges, and faults are one line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from studies import write
from tiny_models import make_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from rlhf_lightning.cli.commands import main
from rlhf_lightning.preferences import generate
from rlhf_lightning.preferences.items import read_candidates
from rlhf_lightning.preferences.tasks import Pairs

WORDS = ("cat", "dog", "mat", "the")


@pytest.fixture(scope="module")
def other_policy_dir(tmp_path_factory: pytest.TempPathFactory, kept_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("other") / "policy"
    torch.manual_seed(7)
    LlamaForCausalLM(make_config()).save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"id": f"q{n}", "prompt": f"the {WORDS[n % 4]} {'the ' * (n % 3)}", "topic": n} for n in range(12)]
    return write(tmp_path / "prompts.jsonl", rows)


def run(prompts: Path, out: Path, policies: list[str], *more: str) -> int:
    command = ["generate", "--policies", *policies, "--prompts", str(prompts), "--out", str(out)]
    return main([*command, "--max_new_tokens", "5", "--batch_size", "4", *more])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_can_be_judged(
    prompts: Path, tmp_path: Path, tiny_policy_dir: Path, other_policy_dir: Path, capsys
) -> None:
    out = tmp_path / "c.jsonl"
    assert run(prompts, out, [f"sft={tiny_policy_dir}", f"ppo={other_policy_dir}"], "--count", "2") == 0
    rows = read(out)
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(12)]
    for row in rows:
        assert set(row) == {"id", "prompt", "completions", "policies", "topic"}
        assert 2 <= len(row["completions"]) == len(row["policies"]) <= 4
        assert len(set(row["completions"])) == len(row["completions"])
    assert rows[3]["prompt"] == "the the "
    said = capsys.readouterr().out
    assert "sft: 24 answers, " in said and "tokens/s" in said
    assert "12 of 12 prompts; left out: none" in said
    assert read_candidates(str(out), Pairs()).rows == 12
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    # The place of an answer does not tell its policy.
    first = Counter(row["policies"][0].split("+")[0] for row in rows)
    assert len(first) == 2


def test_equal_answers_stand_once_with_all_their_policies(prompts: Path, tmp_path: Path, tiny_policy_dir: Path) -> None:
    out = tmp_path / "c.jsonl"
    names = [f"a={tiny_policy_dir}", f"b={tiny_policy_dir}"]
    assert run(prompts, out, names, "--count", "1", "--temperature", "0") == 2  # both say the same, always
    assert not out.exists()
    assert run(prompts, tmp_path / "d.jsonl", names, "--count", "6", "--max_new_tokens", "1") == 0
    rows = read(tmp_path / "d.jsonl")
    assert any(policy == "a+b" for row in rows for policy in row["policies"])
    assert all(policy in ("a", "b", "a+b") for row in rows for policy in row["policies"])


class Killed(BaseException):
    """Stands for a kill: nothing is cleaned up after it."""


@pytest.mark.parametrize("after", [1, 3, 7])
def test_a_killed_command_goes_on_and_gives_the_same_bytes(
    prompts: Path, tmp_path: Path, tiny_policy_dir: Path, other_policy_dir: Path, monkeypatch, capsys, after: int
) -> None:
    names = [f"sft={tiny_policy_dir}", f"ppo={other_policy_dir}"]
    assert run(prompts, tmp_path / "whole.jsonl", names, "--count", "2") == 0
    keep, kept = generate._Answered.keep, []

    def dying(self, part) -> None:
        if len(kept) == after:
            self._file.write(b'{"policy": "sft", "num')  # cut off within a line
            raise Killed
        kept.append(part)
        keep(self, part)

    monkeypatch.setattr(generate._Answered, "keep", dying)
    with pytest.raises(Killed):
        run(prompts, tmp_path / "c.jsonl", names, "--count", "2")
    assert not (tmp_path / "c.jsonl").exists()
    again: list = []
    monkeypatch.setattr(generate._Answered, "keep", lambda self, part: (again.append(part), keep(self, part)))
    capsys.readouterr()
    assert run(prompts, tmp_path / "c.jsonl", names, "--count", "2") == 0
    assert len(again) == 12 - after  # two policies, two answers, three batches
    assert "of them before" in capsys.readouterr().out
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_command_does_not_mix_with_what_is_there(
    prompts: Path, tmp_path: Path, tiny_policy_dir: Path, capsys
) -> None:
    (tmp_path / ".c.jsonl.part").write_text('{"asked": "else"}\n')
    assert run(prompts, tmp_path / "c.jsonl", [f"a={tiny_policy_dir}"]) == 2
    assert "holds answers of another command" in capsys.readouterr().err
    (tmp_path / ".c.jsonl.part").write_text("what\n")
    assert run(prompts, tmp_path / "c.jsonl", [f"a={tiny_policy_dir}"]) == 2
    assert ".c.jsonl.part:1: is damaged" in capsys.readouterr().err


def test_the_batch_size_changes_nothing(prompts: Path, tmp_path: Path, tiny_policy_dir: Path) -> None:
    for size in (1, 5):
        assert run(prompts, tmp_path / f"{size}.jsonl", [f"a={tiny_policy_dir}"], "--batch_size", str(size)) == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "5.jsonl").read_bytes()


def test_policies_and_seeds_have_draws_of_their_own(prompts: Path, tmp_path: Path, tiny_policy_dir: Path) -> None:
    names = [f"a={tiny_policy_dir}", f"b={tiny_policy_dir}"]
    assert run(prompts, tmp_path / "0.jsonl", names, "--count", "1") == 0
    assert run(prompts, tmp_path / "1.jsonl", names, "--count", "1", "--seed", "1") == 0
    zero, one = read(tmp_path / "0.jsonl"), read(tmp_path / "1.jsonl")
    assert len(zero) > 6  # one model, two draws
    assert zero != one


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--count", "1"), "--count 1: one answer of one policy leaves nothing to compare"),
        (("--count", "0"), "--count 0: must be 1 or more"),
        (("--temperature", "0"), "--count 4: at --temperature 0"),
        (("--temperature", "nan"), "--temperature nan: must be 0 or more"),
        (("--device", "cuda"), "--device cuda: no CUDA device here"),
        (("--policies", "a="), "--policies a=: expected NAME=DIR"),
        (("--policies", "a=none"), "none: no such folder"),
        (("--policies", "a+b=x"), "has no '+'"),
        (("--prompts", "none.jsonl"), "none.jsonl"),
        (("--max_new_tokens", "100000"), "--max_new_tokens"),
    ],
)
def test_faults_are_one_line(
    prompts: Path, tmp_path: Path, tiny_policy_dir: Path, capsys, monkeypatch, more: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(prompts, tmp_path / "c.jsonl", [f"a={tiny_policy_dir}"], *more) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_file_that_exists_and_an_id_twice(prompts: Path, tmp_path: Path, tiny_policy_dir: Path, capsys) -> None:
    assert run(prompts, prompts, [f"a={tiny_policy_dir}"]) == 2
    assert "this command reads it" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text("")
    assert run(prompts, tmp_path / "c.jsonl", [f"a={tiny_policy_dir}"]) == 2
    assert "exists already" in capsys.readouterr().err
    twice = write(tmp_path / "twice.jsonl", [{"id": 1, "prompt": "the cat"}, {"id": "1", "prompt": "the dog"}])
    assert run(twice, tmp_path / "d.jsonl", [f"a={tiny_policy_dir}"]) == 2
    assert "twice.jsonl:2: key 'id': is '1' as in" in capsys.readouterr().err
