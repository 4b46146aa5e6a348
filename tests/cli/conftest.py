"""A folder with preference pairs, and options of small runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch  # noqa: F401 - its logger keeps the stderr of its import, which must be no test's own
import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a file of preference pairs."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"the {colour} {animal} sees", "chosen": "a big fish", "rejected": "no"}
        for colour in ("red", "green", "blue")
        for animal in ("cat", "dog", "bird", "fish")
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def sft(folder: Path, tiny_policy_dir: Path) -> list[str]:
    """Options of a small SFT run: 3 batches, one of the 12 prompts held out."""
    options = ["--config", "sft.yaml", "--model.model", str(tiny_policy_dir), "--data.path", "pairs.jsonl"]
    options += ["--data.batch_size", "4", "--data.validation_fraction", "0.1", "--trainer.accelerator", "cpu"]
    return [*options, "--model.optimizer.warmup_steps", "0", "--model.sampling.max_new_tokens", "4"]


@pytest.fixture
def ppo(sft: list[str], tiny_reward_dir: Path) -> list[str]:
    """Options of a small PPO run on the prompts of the same file: 3 iterations of 4 responses."""
    options = ["--config", "ppo.yaml", "--model.reward.path", str(tiny_reward_dir), "--model.iterations", "3"]
    return [*options, *sft[2:], "--trainer.val_check_interval", "1.0"]
