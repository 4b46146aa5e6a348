"""``evaluate`` from the command line to its files, on tiny models; and what bad options get."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel, PreTrainedTokenizerBase

from rlhf_lightning.cli import main as cli
from rlhf_lightning.data.ids import TextIds
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.evaluate import _parser, _proxy, main

PROMPTS = ["a cat", "the red dog likes", "what is a fish ?", "hello", "who sees the bird", "one two three", "why not"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "wanted": "cat"}) + "\n" for p in PROMPTS))
    return path


@pytest.fixture
def judge(tmp_path: Path) -> str:
    path = tmp_path / "judge.py"
    path.write_text(
        "def count(prompts, responses, wanted):\n"
        "    return [r.split().count(w) - 0.01 * len(r) for r, w in zip(responses, wanted)]\n"
    )
    return f"{path}:count"


@pytest.fixture(scope="module")
def other_policy_dir(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with a head that says ``cat`` more often."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(prompts: Path, out: Path, *more: str, policies: list[str]) -> dict:
    arguments = ["--policies", *policies, "--prompts", str(prompts), "--max_new_tokens", "6", "--out", str(out)]
    assert main([*arguments, *more]) == 0
    return json.loads((out / "report.json").read_text())


def test_from_folders_to_a_report(
    tmp_path: Path,
    prompts: Path,
    judge: str,
    tiny_policy_dir: Path,
    other_policy_dir: Path,
    tiny_reward_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "a cat", "completion": "sees the dog ."}\n{"prompt": "hello", "completion": "bye"}\n')
    out = tmp_path / "out"
    report = evaluate(
        prompts,
        out,
        *("--reward", f"judge={judge}", f"proxy={tiny_reward_dir}", "--text", str(text)),
        policies=[f"sft={tiny_policy_dir}", f"flat={other_policy_dir}"],
    )
    assert report["prompts"] == len(PROMPTS)
    assert report["baseline"] == "sft"
    sft, flat = report["policies"]["sft"], report["policies"]["flat"]
    assert sft["kl"] == 0.0  # the reference is the baseline itself
    assert sft["kl_k3"] == 0.0
    assert flat["kl_k3"] > 0.0
    assert "win_rates" not in sft
    for reward in ("judge", "proxy"):
        rate = flat["win_rates"][reward]
        assert 0 <= rate["win_rate_ci"][0] <= rate["win_rate"] <= rate["win_rate_ci"][1] <= 1
    assert 1 < sft["perplexity"] < flat["perplexity"] * 10
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    # The function saw each row's own column, prompt and response: recompute it from what was written.
    for row in rows:
        answer = row["answers"]["flat"]
        expected = answer["response"].split().count("cat") - 0.01 * len(answer["response"])
        assert answer["scores"]["judge"] == pytest.approx(expected, abs=1e-5)
        assert 1 <= answer["tokens"] <= 6
    wins = [
        (b > a) + 0.5 * (a == b)
        for a, b in ((r["answers"]["sft"]["scores"]["proxy"], r["answers"]["flat"]["scores"]["proxy"]) for r in rows)
    ]
    assert flat["win_rates"]["proxy"]["win_rate"] == pytest.approx(sum(wins) / len(wins))
    page = (out / "report.html").read_text()
    assert "win rate over sft, by judge" in page
    printed = capsys.readouterr().out
    assert "flat: 7 prompts answered" in printed
    assert "report.html" in printed


def test_a_policy_that_pleases_the_proxy_alone_is_named_before_any_number(
    tmp_path: Path,
    tiny_policy_dir: Path,
    other_policy_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "judges.py"
    path.write_text(
        "def longer(prompts, responses, wanted):\n    return [float(len(r)) for r in responses]\n"
        "def shorter(prompts, responses, wanted):\n    return [-2.0 * len(r) for r in responses]\n"
    )
    policies = [f"sft={tiny_policy_dir}", f"flat={other_policy_dir}"]
    rewards = [f"longer={path}:longer", f"shorter={path}:shorter"]
    # Seven prompts alone leave wide errors, so each is asked in many ways.
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"prompt": f"{p} {n}", "wanted": "cat"}) + "\n" for p in PROMPTS for n in range(60))
    )
    options = ("--batch_size", "420", "--reward", *rewards)
    plain = evaluate(many, tmp_path / "plain", *options, "--proxy", "shorter", policies=policies)
    means = [plain["policies"][name]["rewards"]["longer"]["mean"] for name in ("sft", "flat")]
    up, down = ("longer", "shorter") if means[1] > means[0] else ("shorter", "longer")
    assert len(plain["warnings"]) == (up == "shorter")
    capsys.readouterr()
    out = tmp_path / "out"
    report = evaluate(many, out, *options, "--proxy", up, policies=policies)
    changes = {
        reward: report["policies"]["flat"]["rewards"][reward]["mean"]
        - report["policies"]["sft"]["rewards"][reward]["mean"]
        for reward in (up, down)
    }
    sentence = (
        f"flat's score by {up} rose by {changes[up]:.2f} over sft's while its score by {down} fell by "
        f"{-changes[down]:.2f}: it exploits {up} and did not become better."
    )
    assert report["warnings"] == [sentence]
    said = capsys.readouterr().out.rpartition("prompts answered")[2].splitlines()
    assert said[1] == f"WARNING: {sentence}"
    page = (out / "report.html").read_text().replace("&#x27;", "'").replace("&#39;", "'")
    assert page.index(sentence) < page.index("420 held-out prompts")


def test_the_proxy_is_the_reward_model_unless_it_is_named(
    tmp_path: Path, prompts: Path, judge: str, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    def proxy(*options: str) -> str | None:
        return _proxy(_parser().parse_args(["--policies", "a=x", "--prompts", "p", *options]))

    folder = str(tiny_reward_dir)
    assert proxy() is None
    assert proxy("--reward", f"gold={judge}", f"model={folder}") == "model"
    assert proxy("--reward", f"gold={judge}", f"other={judge}") == "gold"
    assert proxy("--reward", f"gold={judge}", f"a={folder}", f"b={folder}") == "gold"
    assert proxy("--reward", f"gold={judge}", f"model={folder}", "--proxy", "gold") == "gold"
    with pytest.raises(InputError, match="--proxy modle: no such reward: it must be one of gold"):
        proxy("--reward", f"gold={judge}", "--proxy", "modle")
    with pytest.raises(InputError, match="--proxy gold: no such reward: no --reward is given"):
        proxy("--proxy", "gold")


def test_equal_policies_tie_everywhere_and_batching_changes_nothing(
    tmp_path: Path, prompts: Path, judge: str, tiny_policy_dir: Path
) -> None:
    twice = [f"first={tiny_policy_dir}", f"second={tiny_policy_dir}"]
    report = evaluate(prompts, tmp_path / "a", "--reward", judge, policies=twice)
    again = evaluate(prompts, tmp_path / "b", "--reward", judge, "--batch_size", "2", policies=twice)
    second = report["policies"]["second"]
    assert second["win_rates"]["count"]["win_rate"] == 0.5
    assert second["rewards"] == report["policies"]["first"]["rewards"]
    assert again["policies"]["second"]["rewards"] == second["rewards"]
    assert (tmp_path / "a" / "samples.jsonl").read_text() == (tmp_path / "b" / "samples.jsonl").read_text()


def test_the_best_of_n_is_a_row_of_its_own(
    tmp_path: Path, prompts: Path, judge: str, tiny_policy_dir: Path, other_policy_dir: Path
) -> None:
    options = ("--reward", judge, "--best_of", "sft=8", "flat=2")
    both = [f"sft={tiny_policy_dir}", f"flat={other_policy_dir}"]
    report = evaluate(prompts, tmp_path / "a", *options, policies=both)
    assert list(report["policies"]) == ["sft", "flat", "sft best of 8", "flat best of 2"]
    sft, flat, best_sft, best_flat = report["policies"].values()
    assert best_sft["rewards"]["count"]["mean"] > sft["rewards"]["count"]["mean"]
    assert best_sft["kl_bound"] == pytest.approx(math.log(8) - 7 / 8)  # the policy is the reference
    assert "kl" not in best_sft
    # Of another policy the bound has its own distance from the reference, as measured at the chosen answers.
    assert best_flat["kl_bound"] == pytest.approx(math.log(2) - 1 / 2 + flat["kl"], abs=10 * flat["kl_standard_error"])
    again = evaluate(prompts, tmp_path / "b", *options, "--batch_size", "3", policies=both)
    assert again["policies"]["sft best of 8"]["rewards"] == best_sft["rewards"]
    assert (tmp_path / "a" / "samples.jsonl").read_text() == (tmp_path / "b" / "samples.jsonl").read_text()
    assert "at most 1.20" in (tmp_path / "a" / "report.html").read_text()


def test_reward_of_another_vocabulary_scores_every_policy(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    plain_dir, renumbered = _wordy(tiny_policy_dir, tmp_path / "plain"), tmp_path / "renumbered"
    _renumbered(plain_dir, renumbered)
    report = evaluate(
        prompts,
        tmp_path / "out",
        *("--reward", f"proxy={tiny_reward_dir}", "--temperature", "0"),
        policies=[f"plain={plain_dir}", f"renumbered={renumbered}"],
    )
    # The same model under other ids says the same greedily, so the reward model must give it the same scores.
    plain, other = report["policies"]["plain"], report["policies"]["renumbered"]
    assert other["rewards"]["proxy"]["mean"] == pytest.approx(plain["rewards"]["proxy"]["mean"], abs=1e-4)
    assert other["win_rates"]["proxy"]["over"] == "plain"
    assert "kl" not in other  # no KL between vocabularies
    with pytest.raises(InputError, match=r"--reference .* vocabulary"):
        evaluate(prompts, tmp_path / "x", "--reference", str(tiny_policy_dir), policies=[f"renumbered={renumbered}"])
    assert not (tmp_path / "x").exists()


def _wordy(folder: Path, to: Path) -> Path:
    """The model made to answer greedily in words and EOS alone: other special tokens do not survive decoding."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    silent = [0, 2, 3, *range(len(tokenizer), model.config.vocab_size)]
    with torch.no_grad():
        model.lm_head.weight[silent] = 0.0
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def _renumbered(folder: Path, to: Path) -> None:
    """The same model with the ids of two words exchanged, in tokenizer and weights alike."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    a, b = tokenizer.convert_tokens_to_ids(["cat", "dog"])
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[[a, b]] = weight[[b, a]].clone()
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    path = to / "tokenizer.json"
    data = json.loads(path.read_text())
    words = data["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "a={policy}", "a={policy}"], "two are named 'a'"),
        (["--policies", "={policy}"], "expected NAME=DIR"),
        (["--policies", "a={policy}", "--baseline", "b"], "--baseline b: no such policy"),
        (["--policies", "a={folder}/missing"], "missing: no such folder"),
        (["--policies", "a={policy}", "--temperature", "1e-13"], "--temperature 1e-13: .*from 1e-12"),
        (["--policies", "a={policy}", "--temperature", "nan"], "--temperature"),
        (["--policies", "a={policy}", "--batch_size", "0"], "--batch_size 0"),
        (["--policies", "a={policy}", "--reward", "{folder}/no.py:score"], "no.py does not exist"),
        (["--policies", "a={policy}", "--reward", "r={policy}"], "no trained reward head"),
        (["--policies", "a={policy}", "--prompts", "{folder}/no.jsonl"], "no.jsonl"),
        (["--policies", "a={policy}", "--max_new_tokens", "500"], "positions .*lower --max_new_tokens, and drop"),
        (["--policies", "a={policy}", "--text", "{prompts}"], "prompts.jsonl:1"),
        (["--policies", "a={policy}", "--out", "{prompts}"], "a file, where a folder"),
        (["--policies", "a={policy}", "--device", "cuda:99"], "cuda:99"),
        (["--policies", "a={policy}", "--best_of", "b=4"], "--best_of b=4: no such policy"),
        (["--policies", "a={policy}", "--reward", "x.py:f", "--best_of", "a=1"], "a number of at least 2"),
        (["--policies", "a={policy}", "--best_of", "a=4"], "no --reward"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    given = [o.format(policy=tiny_policy_dir, folder=tmp_path, prompts=prompts) for o in options]
    first = [] if "--prompts" in given else ["--prompts", str(prompts)]
    with pytest.raises(InputError, match=message) as caught:
        main([*first, "--out", str(out), "--max_new_tokens", "4", *given])
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(("words", "least", "most"), [(125, 125, 140), (200_000, 125, 20_000)])
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_without_room_for_an_answer_is_named(
    chat: bool,
    words: int,
    least: int,
    most: int,
    tmp_path: Path,
    tiny_policy_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A megabyte by its beginning, which is all that is tokenised of it."""
    path, seen = tmp_path / "prompts.jsonl", []
    texts = ("hello", "cat " * words, "bye")
    asked = [[{"role": "user", "content": text}] if chat else text for text in texts]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    plain = TextIds._call
    monkeypatch.setattr(TextIds, "_call", lambda ids, texts, **more: seen.extend(texts) or plain(ids, texts, **more))
    with pytest.raises(InputError, match=r"prompts.jsonl:2: .* may take \d+ tokens and .* positions for 128") as told:
        main(["--policies", str(tiny_policy_dir), "--prompts", str(path), "--max_new_tokens", "4"])
    (counted,) = re.findall(r"may take (\d+) tokens", str(told.value))
    assert least <= int(counted) - 4 <= most
    assert max(map(len, seen)) < 40_000


def test_what_is_left_out_is_said_everywhere(
    tmp_path: Path, judge: str, tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [("a cat", "cat"), ("a cat", "cat"), ("a cat", "dog"), ("a cat ", "dog"), ("hello", "cat"), ("bye", "cat")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "wanted": w}) + "\n" for p, w in asked))
    said = "3 of 6 rows; left out: repeated prompts 2, over --max_prompts 3 1"
    options = ["--reward", judge, "--max_prompts", "3"]
    report = evaluate(path, tmp_path / "o", *options, policies=[str(tiny_policy_dir)])
    assert said in capsys.readouterr().out
    assert (report["rows_read"], report["left_out"]) == (6, {"repeated prompts": 2, "over --max_prompts 3": 1})
    assert report["settings"]["prompts"].startswith(said) and said in (tmp_path / "o" / "report.html").read_text()


def test_what_evaluate_reads_is_not_written_over(tmp_path: Path, prompts: Path, tiny_policy_dir: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    own = prompts.rename(out / "samples.jsonl")
    before = own.read_bytes()
    with pytest.raises(InputError, match=r"--out .*samples.jsonl: this command reads it"):
        evaluate(own, out, policies=[str(tiny_policy_dir)])
    assert own.read_bytes() == before and [path.name for path in out.iterdir()] == ["samples.jsonl"]


def test_max_prompts_are_spread_over_the_file(tmp_path: Path, prompts: Path, tiny_policy_dir: Path) -> None:
    report = evaluate(prompts, tmp_path / "o", "--max_prompts", "3", policies=[str(tiny_policy_dir)])
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "o" / "samples.jsonl").read_text().splitlines()]
    assert rows == [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    assert list(report["policies"]) == [tiny_policy_dir.name]


def test_memory_that_runs_out_names_sizes_and_options(
    tmp_path: Path, prompts: Path, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward = LlamaModel.forward

    def starved(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", starved)
    asked = ["--prompts", str(prompts), "--max_new_tokens", "6", "--batch_size", "4", "--out", str(tmp_path / "out")]
    assert cli(["evaluate", "--policies", str(tiny_policy_dir), *asked]) == 1
    told = capsys.readouterr().err
    assert re.match(r"error: out of memory in evaluate: the last forward pass was of \d rows x \d tokens, voc", told)
    assert "vocabulary 64, float32; lower --batch_size (4) or --max_new_tokens (6); CUDA out of memory. Tried" in told
    assert not (tmp_path / "out").exists()
