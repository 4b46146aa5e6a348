"""A micro run of the whole demo: its report's schema, the run folders, and bad options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_lightning.cli.configs import shipped_configs
from rlhf_lightning.demo import main as demo
from rlhf_lightning.demo import results as demo_results
from rlhf_lightning.demo.stages import HACKING, Size
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.compare import Answers, Comparison, Settings
from rlhf_lightning.evaluation.html_report import render

ROOT = Path(__file__).resolve().parents[2]
MICRO = Size(
    train=48,
    held_out=12,
    ranked=12,
    candidates=2,
    annotator_temperature=1.0,
    hidden=16,
    layers=1,
    options={
        "sft": ("--trainer.max_steps", "3", "--model.optimizer.warmup_steps", "1"),
        "reward_model": ("--data.batch_size", "8", "--model.optimizer.warmup_steps", "1"),
        "ppo": ("--model.iterations", "2", "--data.batch_size", "8"),
        "dpo": ("--data.batch_size", "8", "--model.optimizer.warmup_steps", "1"),
        "rloo": ("--model.iterations", "2", "--data.batch_size", "2"),
        "kto": ("--data.batch_size", "8", "--model.optimizer.warmup_steps", "1"),
    },
)
METHODS = ("ppo", "rloo", "dpo", "kto", "best_of_n")  # one of each kind beside the default ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "out"
    demo.run(root, MICRO, seed=7, methods=METHODS)
    return root


def test_report_json_has_exactly_the_promised_keys(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    aligned = {"gold_reward", "proxy_reward", "kl", "win_rate_vs_sft", "win_rate_ci"}
    assert set(report) == {"seed", "warnings", "versions", "wall_seconds", "sft", "reward_model", *METHODS}
    assert set(report["sft"]) == {"perplexity", "gold_reward"}
    assert set(report["reward_model"]) == {"accuracy", "label_ceiling", "calibration_error"}
    assert all(set(report[method]) == aligned for method in METHODS)
    assert report["seed"] == 7
    numbers = [report[part] for part in ("sft", "reward_model", *METHODS, "wall_seconds")]
    values = [value for part in numbers for value in part.values() if not isinstance(value, list)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    for policy in METHODS:
        low, high = report[policy]["win_rate_ci"]
        assert 0 <= low <= report[policy]["win_rate_vs_sft"] <= high <= 1
    assert 0.5 <= report["reward_model"]["label_ceiling"] <= 1
    assert max(METHODS, key=lambda method: report[method]["proxy_reward"]) == "best_of_n"  # it is chosen by it


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "rloo", "dpo", "kto"])
def test_every_stage_leaves_a_normal_run_folder(folder: Path, stage: str) -> None:
    run = folder / stage
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model"} <= {path.name for path in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "samples.jsonl").is_file() == (stage != "reward_model")


def test_the_page_shows_what_was_promised(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    few = "Only the baseline and the policies with the highest means"  # six histograms over each other cannot be read
    titles = ("Learning curves", "Proxy and gold reward over KL", "Rewards by gold", "Samples")
    for title in (*titles, "Gold reward over KL, along each method", "RLOO: score", "KTO: accuracy", "best of 8", few):
        assert title in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html


def test_a_demo_makes_way_for_the_next_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "precious").write_text("a user's run")
    with pytest.raises(InputError, match=r"holds sft and is no demo's folder"):
        demo.main(["--out", str(tmp_path)])
    assert (tmp_path / "sft" / "precious").exists()
    fresh = tmp_path / "demo"
    demo._clear(fresh)  # what the first demo does before it writes
    (fresh / "sft").mkdir()
    (fresh / "report.json").write_text("{}")
    (fresh / "notes.txt").write_text("the user's")
    demo._clear(fresh)
    assert sorted(path.name for path in fresh.iterdir()) == [".demo", "notes.txt"]


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--out .*: a file"):
        demo.main(["--out", str(tmp_path / "file")])
    with pytest.raises(InputError, match="--methods grop: no such method: it must be all, or some of ppo, grpo"):
        demo.main(["--methods", "grpo", "grop"])
    with pytest.raises(InputError, match="--seed -1"):
        demo.main(["--seed", "-1"])
    with pytest.raises(InputError, match="--hacking: not allowed with argument --quick"):
        demo.main(["--quick", "--hacking"])


def test_methods_come_beside_the_default_ones() -> None:
    assert demo._methods([]) == ("ppo", "dpo")
    assert demo._methods(["kto", "grpo", "ppo"]) == ("ppo", "grpo", "dpo", "kto")
    assert demo._methods(["all"]) == tuple(demo.METHODS)


def test_every_method_that_trains_has_a_config() -> None:
    trained = {f"demo/{name}.yaml" for name, method in demo.METHODS.items() if method.kind != "untrained"}
    assert trained | {"demo/sft.yaml", "demo/reward_model.yaml"} == {
        name for name in shipped_configs() if name.startswith("demo/") and name.count("/") == 1
    }
    assert set(HACKING.configs.values()) == {name for name in shipped_configs() if name.startswith("demo/hacking/")}


def test_a_policy_that_exploits_the_reward_model_is_named_before_any_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert isinstance(report["warnings"], list)
    ends = (torch.zeros(2), torch.full((2,), 30), torch.zeros(2, dtype=torch.bool), torch.zeros(2))
    measured = {
        policy: Answers(
            ["a", "b"], ends[1], ends[2], ends[3].double(), scores, k1=ends[0].double(), k3=ends[0].double()
        )
        for policy, scores in {
            "sft": {"gold": torch.tensor([0.0, 1.0]), "proxy": torch.tensor([0.0, 1.0])},
            "ppo": {"gold": torch.tensor([-3.0, -2.0]), "proxy": torch.tensor([5.25, 6.25])},
            "dpo": {"gold": torch.tensor([1.0, 2.0]), "proxy": torch.tensor([1.0, 2.0])},
        }.items()
    }
    results = replace(
        _results(folder), comparison=Comparison(["a", "b"], measured, "sft", ("gold", "proxy"), Settings())
    )
    sentence = (
        "PPO's score by the reward model rose by 5.25 over SFT's while its score by the gold reward fell by 3.00: it "
        "exploits the reward model and did not become better."
    )
    assert results.numbers()["warnings"] == [sentence]
    html = render(demo_results.page(results)).replace("&#39;", "'").replace("&#x27;", "'")
    assert html.index(sentence) < html.index("A tiny Llama") < html.index("What was run")
    monkeypatch.setattr(demo, "run", lambda *_: results)
    assert demo.main(["--out", str(tmp_path / "demo")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"WARNING: {sentence}")


def _results(folder: Path) -> demo_results.Results:
    curves = demo_results.read_all_curves(folder, ("ppo", "dpo"))
    nothing = Comparison([], {}, "sft", (), Settings())
    return demo_results.Results(0, {"total": 1.0}, nothing, curves, 0.75, {})


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rlhf_lightning.demo.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
