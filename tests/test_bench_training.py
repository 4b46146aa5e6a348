"""The benchmark of training: it runs at a tiny size, every side does the same work, and missing peers are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from training import meter, ours, rounds, sizes  # noqa: E402


def test_state_is_counted_from_shapes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    model[1].weight = torch.nn.Parameter(model[0].weight.detach().T)  # shares its storage
    optimizer = torch.optim.AdamW(model[0].parameters())
    assert meter.state_bytes([model], optimizer) == {"models": 4 * (12 + 4 + 3), "gradients": 4 * 16, "optimizer": 0}
    model[0](torch.ones(3)).sum().backward()
    optimizer.step()
    assert meter.state_bytes([model], optimizer)["optimizer"] == 2 * 4 * 16 + 2 * 4  # two moments, and a step each


def test_different_work_is_found() -> None:
    def run(tokens: float, seconds: list[float]) -> dict:
        step = {"new_tokens": tokens, "optimizer_steps": 4.0, "score": 1.0}
        state = {"models": 1.0, "gradients": 1.0, "optimizer": 1.0}
        held = {"peak_mb": 10.0 * tokens, "libraries_mb": 2.0, "state_mb": state}
        return {"seconds": seconds, "work": [step], "phases": [{"update": 1.0}], **held}

    results = {"runs": {"ours": [run(5.0, [1.0, 3.0]), run(5.0, [2.0])], "peer": [run(5.0, [8.0])]}}
    rounds.summary(results)
    assert results["ours"] == {"seconds": 2.0, "peak_mb": 50.0}
    assert results["ratio"] == {"peer": {"time": 4.0, "memory": 1.0}} and results["same_work"]
    results["runs"]["peer"] = [run(6.0, [8.0])]
    rounds.summary(results)
    assert not results["same_work"]


@pytest.mark.slow
def test_every_side_does_the_same_work_and_missing_peers_are_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    target = tmp_path / "out" / "ppo.json"
    command = [sys.executable, "benchmarks/bench_training.py", "--task", "ppo", "--size", "tiny", "--threads", "1"]
    command += ["--rounds", "1", "--warm-up", "1", "--timed", "2", "--apart", "1", "--json", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(target.read_text(encoding="utf-8"))
    page = target.with_suffix(".md").read_text(encoding="utf-8")

    assert [results[key] for key in ("task", "size", "device")] == ["ppo", "tiny", "cpu"]
    assert set(results["ours"]) == {"seconds", "peak_mb"} and min(results["ours"].values()) > 0
    assert set(results["peers"]) == set(results["ratio"]) == {"plain PyTorch"}
    assert set(results["ratio"]["plain PyTorch"]) == {"time", "memory"}
    assert results["same_work"] and results["work"]["ours"] == {"new_tokens": 40.0, "optimizer_steps": 4.0}
    assert "peers/install.py trl_ppo" in results["missing"]["TRL 1.12.0 PPO"] and "TRL 1.12.0 PPO" in done.stdout
    parts = ("rollout", "reference", "reward", "critic", "update")
    assert all(results["breakdown"]["ours"][part] > 0 for part in (*parts, "other"))
    assert all(results["limits"]["seconds"][part] > 0 for part in parts)
    assert {"score, first", "score, last"} <= set(results["quality"]["plain PyTorch"])
    assert results["about"]["torch"] == torch.__version__ and results["about"]["commands"][0] in page


@pytest.mark.parametrize("task", ["sft", "reward_model", "dpo"])
def test_supervised_steps_are_counted(task: str, tmp_path: Path) -> None:
    size = sizes.SIZES["tiny"]
    sizes.fill(size, tmp_path)
    seen = meter.Meter("cpu", 1, 2, 1, rest="update")
    measured = ours.run(task, size, tmp_path, "cpu", "float32", seen, seed=0)
    rows = sizes.work(tmp_path)
    if task == "sft":
        tokens = sum(len(prompt) + len(response) for prompt, response in rows["demonstrations"])
    else:
        tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in rows["pairs"])
    counts = [{name: step[name] for name in ("tokens", "optimizer_steps")} for step in measured["work"]]
    assert counts == [{"tokens": float(tokens), "optimizer_steps": 1.0}] * 4
    assert measured["work"][-1]["loss"] < measured["work"][0]["loss"]  # the same rows in every step
    assert len(measured["seconds"]) == 2 and measured["phases"][0]["update"] > 0
    assert ("reference" in measured["phases"][0]) == (task == "dpo")


def test_reward_at_equal_kl() -> None:
    pytest.importorskip("yaml")
    import demo_against_trl as script

    def line(kl: float, gain: float) -> list[dict[str, float]]:
        return [{"kl": kl * step, "score": gain * kl * step} for step in range(21)]

    found = script.equal_kl({"ours": line(0.5, 2.0), "peer": line(1.0, 1.5)})
    assert found == pytest.approx({"kl": 9.0, "ours": 18.0, "peer": 13.5})  # the mean of the last five of 0 to 10
