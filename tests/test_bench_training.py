"""The benchmark of training: it runs at a tiny size, every side does the same work, and missing peers are named."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_training  # noqa: E402
from harness.clock import Meter, state_bytes  # noqa: E402
from training import ours, plain_ppo, rounds, sizes  # noqa: E402


def test_state_is_counted_from_shapes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    model[1].weight = torch.nn.Parameter(model[0].weight.detach().T)  # shares its storage
    optimizer = torch.optim.AdamW(model[0].parameters())
    assert state_bytes([model], optimizer) == {"models": 4 * (12 + 4 + 3), "gradients": 4 * 16, "optimizer": 0}
    model[0](torch.ones(3)).sum().backward()
    optimizer.step()
    assert state_bytes([model], optimizer)["optimizer"] == 2 * 4 * 16 + 2 * 4  # two moments, and a step each


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


def test_the_plain_loop_learns_the_same_in_smaller_passes(tmp_path: Path) -> None:
    """Its passes are cut where a minibatch is more than memory holds: the same steps, and the same samples after."""
    whole = sizes.SIZES["tiny"]
    sizes.fill(whole, tmp_path)
    cut = replace(whole, micro_rows=1)
    found = [
        plain_ppo.run("ppo", size, tmp_path, "cpu", "float32", Meter("cpu", 1, 1, 1), seed=0)["work"]
        for size in (whole, cut)
    ]
    assert [step["optimizer_steps"] for step in found[1]] == [4.0] * 3
    assert abs(found[0][2]["kl"]) > 1e-4  # it has moved
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
def test_every_side_does_the_same_work_and_missing_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "ppo.json"
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    monkeypatch.setattr("peers.install.INSTALLED", tmp_path / "peers")
    options = ["--task", "ppo", "--size", "tiny", "--threads", "1", "--rounds", "1", "--json", str(target)]
    options += ["--warm-up", "1", "--timed", "2", "--apart", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *options])
    assert bench_training.main() == 3  # all but TRL, which was asked for
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "asked for, and could not run: TRL 1.12.0 PPO"
    results = json.loads(target.read_text(encoding="utf-8"))
    page = target.with_suffix(".md").read_text(encoding="utf-8")

    committed = next((ROOT / "benchmarks" / "results").glob("training_ppo_16m_*.json"))
    assert set(results) == set(json.loads(committed.read_text(encoding="utf-8")))
    assert [results[key] for key in ("task", "size", "device")] == ["ppo", "tiny", "cpu"]
    assert set(results["ours"]) == {"seconds", "peak_mb"} and min(results["ours"].values()) > 0
    assert set(results["peers"]) == set(results["ratio"]) == {"plain PyTorch"}
    assert set(results["ratio"]["plain PyTorch"]) == {"time", "memory"}
    assert results["same_work"] and results["work"]["ours"] == {"new_tokens": 40.0, "optimizer_steps": 4.0}
    assert "peers/install.py trl_ppo" in results["missing"]["TRL 1.12.0 PPO"] and "TRL 1.12.0 PPO" in said.out
    parts = ("rollout", "reference", "reward", "critic", "update")
    assert all(results["breakdown"]["ours"][part] > 0 for part in (*parts, "other"))
    assert all(results["limits"]["seconds"][part] > 0 for part in parts)
    assert {"score, first", "score, last"} <= set(results["quality"]["plain PyTorch"])
    assert results["about"]["torch"] == torch.__version__ and results["about"]["commands"][0] in page


def test_the_plain_loops_passes_see_each_steps_weights_under_autocast(tmp_path: Path) -> None:
    size = replace(sizes.SIZES["tiny"], learning_rate={"ppo": 0.05}, minibatches=2)
    sizes.fill(size, tmp_path)
    seen: list[torch.Tensor] = []
    found = plain_ppo.response_log_probs

    def noted(model: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        log_probs = found(model, tokens, *rest)
        if torch.is_grad_enabled():
            weight = model.model.layers[0].mlp.up_proj.weight
            seen.append(torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight))
            assert seen[-1].dtype == torch.bfloat16
        return log_probs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_ppo, "response_log_probs", noted)
        plain_ppo.run("ppo", size, tmp_path, "cpu", "bf16-mixed", Meter("cpu", 0, 1, 0), seed=0)
    assert len(seen) == 2 and not torch.equal(*seen)


@pytest.mark.parametrize(
    ("task", "precision"), [("sft", "float32"), ("reward_model", "float32"), ("dpo", "float32"), ("dpo", "bf16-mixed")]
)
def test_supervised_steps_are_counted(task: str, precision: str, tmp_path: Path) -> None:
    size = sizes.SIZES["tiny"]
    sizes.fill(size, tmp_path)
    seen = Meter("cpu", 1, 2, 1, rest="update")
    measured = ours.run(task, size, tmp_path, "cpu", precision, seen, seed=0)
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


def test_runs_of_another_gpu_are_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "runs.json"
    work = {"task": "sft", "size": "tiny", "device": "cpu", "precision": "float32", "compile": False}
    chosen = Namespace(device="cpu", threads=1, only=["ours"], json=target)
    fresh = bench_training.start(chosen, work)
    bench_training.keep(fresh, target)
    assert bench_training.start(chosen, work)["runs"] == {}
    about = bench_training.report.about
    monkeypatch.setattr(bench_training.report, "about", lambda *given: {**about(*given), "gpu": "another"})
    with pytest.raises(SystemExit, match="another machine"):
        bench_training.start(chosen, work)


def test_reward_at_equal_kl_by_hand() -> None:
    pytest.importorskip("yaml")
    import demo_against_trl as script

    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"kl": kl, "score": score} for kl, score in points]

    # The first point is left out. Bins: 0.5 to 1 (ours 3, TRL 2), 1 to 1.5 (4, 6), and one each that the other lacks.
    ours = curve((0.6, 100.0), (0.5, 2.0), (0.99, 4.0), (1.0, 4.0), (7.0, -9.0))
    theirs = curve((1.2, 100.0), (0.7, 2.0), (1.4, 5.0), (1.2, 7.0), (2.0, 8.0))
    found = script.compared({script.OURS: ours, script.TRL: theirs})
    assert found["at_equal_kl"] == pytest.approx({"bins": 2, "difference": (1.0 - 2.0) / 2})
    apart = script.compared({script.OURS: ours, script.TRL: curve((0.0, 0.0), (9.0, 1.0))})
    assert apart["at_equal_kl"] == {"bins": 0, "difference": None}
    long = [{"kl": float(step), "score": 2.0 * step} for step in range(21)]  # the last ten are 11 to 20
    last = script.compared({script.OURS: long, script.TRL: theirs})["last"][script.OURS]
    assert last == pytest.approx({"score": 31.0, "kl": 15.5, "objective": 31.0 - 0.1 * 15.5})


def test_finished_seeds_are_compared_anew_from_their_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yaml")
    import demo_against_trl as script

    def seed(gain: float) -> dict:
        curve = [{"kl": 0.1 * step, "score": 0.2 * step} for step in range(12)]
        better = [{"kl": point["kl"], "score": point["score"] + gain} for point in curve]
        end = {"kl": 1.0, "proxy": 1.0, "gold": 2.0}
        ends = {"sft": end, script.OURS: {**end, "gold": 2.0 + gain}, script.TRL: end}
        return {"curves": {script.OURS: better, script.TRL: curve}, "held_out": ends, "at_equal_kl": "of another day"}

    target = tmp_path / "against.json"
    about = {**script.report.about("cpu", 1), "command": "python one\npython two"}
    results = {"about": about, "size": "full", "seeds": {"0": seed(0.1), "1": seed(0.3)}}
    target.write_text(json.dumps(results))
    monkeypatch.setattr(script, "missing", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["demo_against_trl.py", "--seeds", "0", "1", "--json", str(target)])
    assert script.main() == 0
    found = json.loads(target.read_text(encoding="utf-8"))
    page = target.with_suffix(".md").read_text(encoding="utf-8")
    assert found["about"] == about and "    python one\n    python two\n" in page  # drawn again, not run again
    assert [found["seeds"][key]["at_equal_kl"]["difference"] for key in "01"] == pytest.approx([0.1, 0.3])
    assert page.count("+0.200 (standard error 0.100, 2 seeds)") == 3  # at equal KL, the objective and held-out gold
    picture = target.with_suffix(".png")
    assert (picture.name in page) == picture.exists() and "does not clip" in page
