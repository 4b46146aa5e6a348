"""A micro run of the whole demo: its report's schema, the run folders, and bad options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.demo import main as demo
from rlhf_lightning.demo.stages import Size
from rlhf_lightning.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MICRO = Size(
    train=48,
    held_out=12,
    ranked=12,
    candidates=2,
    hidden=16,
    layers=1,
    options={
        "sft": ("--trainer.max_steps", "3", "--model.warmup_steps", "1"),
        "reward_model": ("--data.batch_size", "8", "--model.warmup_steps", "1"),
        "ppo": ("--model.iterations", "2", "--data.batch_size", "8"),
        "dpo": ("--data.batch_size", "8", "--model.warmup_steps", "1"),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "out"
    demo.run(root, MICRO, seed=7)
    return root


def test_report_json_has_exactly_the_promised_keys(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    aligned = {"gold_reward", "proxy_reward", "kl", "win_rate_vs_sft", "win_rate_ci"}
    assert set(report) == {"seed", "versions", "wall_seconds", "sft", "reward_model", "ppo", "dpo"}
    assert set(report["sft"]) == {"perplexity", "gold_reward"}
    assert set(report["reward_model"]) == {"accuracy", "label_ceiling", "calibration_error"}
    assert set(report["ppo"]) == set(report["dpo"]) == aligned
    assert report["seed"] == 7
    numbers = [report["sft"], report["reward_model"], report["ppo"], report["dpo"], report["wall_seconds"]]
    values = [value for part in numbers for value in part.values() if not isinstance(value, list)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    for policy in ("ppo", "dpo"):
        low, high = report[policy]["win_rate_ci"]
        assert 0 <= low <= report[policy]["win_rate_vs_sft"] <= high <= 1
    assert 0.5 <= report["reward_model"]["label_ceiling"] <= 1


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "dpo"])
def test_every_stage_leaves_a_normal_run_folder(folder: Path, stage: str) -> None:
    run = folder / stage
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "model"} <= {path.name for path in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "samples.jsonl").is_file() == (stage != "reward_model")


def test_the_page_shows_what_was_promised(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    for title in ("Learning curves", "Proxy and gold reward over KL", "Rewards by gold", "Samples"):
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
    with pytest.raises(InputError, match="--seed -1"):
        demo.main(["--seed", "-1"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rlhf_lightning.demo.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
