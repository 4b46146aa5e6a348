"""The progress line: what it shows, how wide it is, and when a plain one is printed."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from small_data import SmallData, train

from rlhf_lightning.callbacks.progress import RunProgress, _batches_of_run
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.sampler import SamplingOptions


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where samples go."""
    monkeypatch.chdir(tmp_path)


def fit(folder: Path, *callbacks: Any, **options: Any) -> None:
    data = SmallData(folder, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], held_out=True)
    options = {"enable_progress_bar": True, "val_check_interval": 2, **options}
    train(
        SFTModule(str(folder), sampling=SamplingOptions(max_new_tokens=4)), data, callbacks=list(callbacks), **options
    )


def test_off_a_terminal_lines_are_plain(tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_policy_dir, RunProgress(every_seconds=1e-6))
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\r" not in output
    shown = output.splitlines()
    last = next(line for line in reversed(shown) if line.startswith("train 5/5"))
    assert ", held-out " in last and last.endswith(" tok/s | 0:00 left")
    assert any("validation 1/2" in line for line in shown)


def test_off_a_terminal_there_are_few_lines(tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_policy_dir, RunProgress(every_seconds=1e6), SampleTable(), max_epochs=2)
    shown = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()]
    # The first batch, every validation, and the last batch.
    numbers = ["1", "2", "4", "7", "9", "10"]
    assert shown == [[f"train {n}/10", f"epoch {1 + (int(n) > 5)}/2"] for n in numbers]


def test_an_end_that_is_a_validation_is_one_line(tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_policy_dir, RunProgress(every_seconds=1e6), val_check_interval=5)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("train 1/5 |") and last.startswith("train 5/5 |") and ", held-out " in last


def test_sft_has_no_rollouts(tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_policy_dir, RunProgress(every_seconds=1e-6), SampleTable())
    output = capsys.readouterr().out
    assert "rollout" not in output and "samples " in output


def test_the_time_that_is_left_is_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rlhf_lightning.callbacks.progress.time.monotonic", lambda: now[0])
    progress = RunProgress()
    progress.disable()
    progress._begin("train", 10, 2)
    now[0], progress._done = 130.0, 5
    progress.on_phase(None, None, "rollout", 31, 64)
    # Three batches took 30 seconds; five are left.
    assert progress.line() == "train 5/10 | rollout 31/64 | 0:50 left"
    progress.on_phase(None, None, "rollout", 64, 64)
    now[0] = 100.0 + 3 * 3600.0
    assert progress.line() == "train 5/10 | 5:00:00 left"
    progress._timer = SimpleNamespace(time_remaining=lambda: 90.0)  # trainer.max_time
    assert progress.line() == "train 5/10 | 1:30 left"


@pytest.mark.parametrize(
    ("an_epoch", "epochs", "steps", "accumulated", "manual", "expected"),
    [
        (5, 3, -1, 1, False, 15),
        (5, -1, 7, 1, False, 7),
        (5, -1, 7, 2, False, 12),  # an epoch of 5 batches is 3 steps: 2 epochs and a step of 2 batches
        (5, 2, 100, 1, False, 10),
        (5, None, -1, 1, False, 0),
        (math.inf, 3, -1, 1, False, 0),
        (math.inf, -1, 7, 2, False, 14),
        (35, 1, 8, 1, True, 2),  # iterations of 2 epochs of 2 minibatches
        (35, 1, -1, 1, True, 35),
    ],
)
def test_the_batches_of_a_run(
    an_epoch: float, epochs: int | None, steps: int, accumulated: int, manual: bool, expected: int
) -> None:
    trainer = SimpleNamespace(
        num_training_batches=an_epoch, max_epochs=epochs, max_steps=steps, accumulate_grad_batches=accumulated
    )
    module = SimpleNamespace(automatic_optimization=not manual, steps_of_iteration=4)
    assert _batches_of_run(trainer, module) == expected


METRICS = {
    "sft": {"train/loss": 12.3456, "val/loss": 2.34567, "train/tokens_per_second": 123456.0},
    "reward": {"train/loss": 0.69314, "val/loss": 0.67891, "val/accuracy": 0.71234, "train/accuracy": 0.8},
    "ppo": {"objective/scores": -1.23456, "val/scores": -1.34567, "objective/kl": 12.3456, "policy/ratio": 1.0},
}


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("sft", 80, "train 1234/5678 | epoch 1/3 | loss 12.3, held-out 2.35 | 11:24:12 left"),
        ("sft", 120, "train 1234/5678 | epoch 1/3 | loss 12.3, held-out 2.35 | 123,456 tok/s | 11:24:12 left"),
        ("sft", 30, "train 1234/5678"),
        ("sft", 9, "train 123"),
        ("reward", 80, "train 1234/5678 | loss 0.693, held-out 0.679 | 11:24:12 left"),
        ("reward", 86, "train 1234/5678 | loss 0.693, held-out 0.679 | held-out accuracy 0.712 | 11:24:12 left"),
        ("ppo", 80, "train 1234/5678 | rollout 31/64 | score -1.23, held-out -1.35 | 11:24:12 left"),
        ("ppo", 87, "train 1234/5678 | rollout 31/64 | score -1.23, held-out -1.35 | kl 12.3 | 11:24:12 left"),
    ],
)
def test_a_terminals_line_never_wraps(kind: str, width: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = RunProgress()
    monkeypatch.setattr(progress, "_seconds_left", lambda: 41052.0)
    progress._stage, progress._done, progress._total, progress._epoch = "train", 1234, 5678, "epoch 1/3"
    progress._metrics = METRICS[kind]
    if kind == "ppo":
        progress._phase = "rollout 31/64"
    progress.console = Console(width=width, file=io.StringIO())
    with progress.console.capture() as captured:
        progress.console.print(progress._rendered())
    (shown,) = captured.get().splitlines()
    assert shown == expected
