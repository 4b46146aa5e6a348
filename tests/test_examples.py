"""The examples run, most for one PPO iteration of a tiny model; so does the reward that the README shows."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_lightning.cli import main
from rlhf_lightning.demo import stages
from rlhf_lightning.models.loading import load_causal_lm

ROOT = Path(__file__).resolve().parent.parent
Fit = Callable[..., list[dict[str, float]]]


@pytest.fixture
def fit(tmp_path: Path, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """One PPO iteration in an empty folder that has ``examples/`` beside it; returns the metrics' lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    colours = ["red", "green", "blue", "good", "bad", "big", "small", "old"]
    rows = [{"prompt": f"the {colour} cat", "keyword": colour} for colour in colours]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("function.yaml").write_text(
        "model:\n  reward:\n    class_path: rlhf_lightning.rewards.FunctionReward\n    init_args:\n"
        "      function: examples/custom_reward_function.py:brevity\n",
        encoding="utf-8",
    )

    def run(*options: str, iterations: int = 1) -> list[dict[str, float]]:
        small = [
            "--model.iterations",
            str(iterations),
            "--model.sampling.max_new_tokens",
            "6",
            "--data.batch_size",
            "4",
        ]
        small += ["--model.update.epochs", "1", "--model.update.minibatches", "1", "--data.validation_fraction", "0.2"]
        small += ["--model.model", str(tiny_policy_dir), "--trainer.accelerator", "cpu"]
        assert main(["fit", "--config", "ppo.yaml", *options, "--data.path", "prompts.jsonl", *small]) == 0
        lines = Path("runs/ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if "objective/scores" in line]

    return run


def test_an_engine_named_in_a_config_gets_every_iterations_weights(fit: Fit, tiny_reward_dir: Path) -> None:
    engine = ["--model.engine", "examples.own_engine.CopyEngine", "--model.engine.folder", str(tiny_reward_dir)]
    lines = fit("--config", "function.yaml", *engine, "--model.optimizer.learning_rate", "0.01", iterations=2)
    assert [line["rollout/logprob_gap"] for line in lines] == pytest.approx([0.0, 0.0], abs=1e-5)


def responses() -> list[str]:
    lines = Path("runs/ppo/samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["response"] for row in map(json.loads, lines) if row["stage"] == "train"]


def test_a_reward_function_named_in_a_config(fit: Fit) -> None:
    (line,) = fit("--config", "function.yaml")
    expected = [1.0 - 0.1 * len(response.split()) for response in responses()]
    assert line["objective/scores"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_reward_function_that_reads_a_column(fit: Fit) -> None:
    name = "examples/custom_reward_function.py:mentions_keyword"
    (line,) = fit("--config", "function.yaml", "--model.reward.function", name)
    assert 0.0 <= line["objective/scores"] <= 1.0


def test_a_reward_by_subclassing(fit: Fit) -> None:
    patient = ["--model", "examples.custom_reward_module.PatientPPO", "--model.patience", "100"]
    (line,) = fit("--config", "function.yaml", *patient)
    # The function alone gives at most 1; 100 a token is paid only to responses that end by themselves.
    truncated = line["rollout/truncated"]
    assert (line["objective/scores"] > 1.0) == (truncated < 1.0)


def test_a_weighted_sum_of_a_model_and_a_function(fit: Fit, tiny_reward_dir: Path) -> None:
    text = (ROOT / "examples" / "weighted_rewards.yaml").read_text(encoding="utf-8")
    Path("weighted.yaml").write_text(text.replace("runs/reward_model/model", str(tiny_reward_dir)), encoding="utf-8")
    (line,) = fit("--config", "weighted.yaml")
    assert abs(line["objective/scores"]) < 100


def test_the_order_of_labels_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    demo = stages.Folder(tmp_path / "demo")
    stages.prepare(demo, replace(stages.QUICK, train=48, held_out=8, hidden=32, layers=1), seed=0)
    demo.model("sft").parent.mkdir()
    demo.start.rename(demo.model("sft"))
    example = importlib.import_module("examples.active_labels")
    example.main(["--demo", str(demo.root), "--out", str(tmp_path / "out"), "--quick"])
    (run,) = json.loads((tmp_path / "out/numbers.json").read_text())["runs"]
    assert run["random"][0] == run["uncertain"][0]  # both begin with the same labels
    printed = capsys.readouterr().out
    assert f"| 16 | {run['random'][1]:.3f} | {run['uncertain'][1]:.3f} |" in printed
    assert (tmp_path / "out/accuracy.svg").read_text().startswith("<svg xmlns")
    labels = [(tmp_path / f"out/{arm}-0-16/labels.jsonl").read_text().splitlines() for arm in ("random", "uncertain")]
    assert [len(rows) for rows in labels] == [16, 16]
    assert labels[0][:8] == labels[1][:8]
    assert labels[0][8:] != labels[1][8:]


def test_the_reward_in_the_readme(fit: Fit) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    function, _ = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    (config,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.S)
    assert len([line for line in (function + config).splitlines() if line.strip()]) <= 10
    Path("my_rewards.py").write_text(function, encoding="utf-8")
    Path("brevity.yaml").write_text(config, encoding="utf-8")
    (line,) = fit("--config", "brevity.yaml")
    assert line["objective/scores"] <= 1.0


def test_the_script_in_the_readme(
    tmp_path: Path, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fish", "food", "milk", "birds"]
    rows = [{"prompt": f"the {word}", "chosen": "is good", "rejected": "is bad"} for word in words * 10]
    Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    Path("prompts.jsonl").write_text('{"prompt": "the fish"}\n{"prompt": "the milk"}\n', encoding="utf-8")
    _, script = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert script.count("MODEL") == 1
    exec(script.replace("MODEL", str(tiny_policy_dir)), {})
    assert len(ast.literal_eval(capsys.readouterr().out.splitlines()[-1])) == 2
    before, after = (load_causal_lm(folder).state_dict() for folder in (tiny_policy_dir, Path("runs/mine/model")))
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
