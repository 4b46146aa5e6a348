"""What the command line says and refuses where a run goes on from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import error_of, metrics

from rlhf_lightning.cli import main

SCHEDULE = "--model.optimizer.schedule"
FOLDER = Path("runs/sft/checkpoints")


def said(capsys: pytest.CaptureFixture[str], heading: str) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix(heading).strip() for line in lines if line.startswith(heading)]


def test_a_run_says_where_it_goes_on_and_what_has_changed(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft, SCHEDULE, "linear", "--trainer.max_steps", "2"]) == 0
    capsys.readouterr()
    changed = ["--model.optimizer.beta2", "0.99", "--trainer.accumulate_grad_batches", "3"]
    assert main(["fit", *sft, SCHEDULE, "linear", "--ckpt_path", "last", "--trainer.max_epochs", "3", *changed]) == 0
    assert said(capsys, "resume") == [
        "from batch-00000002.ckpt, after batch 2 and optimizer step 2",
        "model.optimizer.beta2: 0.999 when the checkpoint was made, now 0.99",
        "trainer.accumulate_grad_batches: 1 when the checkpoint was made, now 3",
        "model.optimizer.schedule: linear ends at step 3, and ended at 2 when the checkpoint was made: the learning "
        "rate goes on at 6.67e-06 in place of 0",
    ]


def test_an_unchanged_run_says_only_where_it_goes_on(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sft += [SCHEDULE, "constant"]
    assert main(["fit", *sft, "--trainer.max_steps", "2"]) == 0
    capsys.readouterr()
    assert main(["fit", *sft, "--ckpt_path", "last"]) == 0
    assert said(capsys, "resume") == ["from batch-00000002.ckpt, after batch 2 and optimizer step 2"]
    assert [row["step"] for row in metrics("sft") if "train/loss" in row] == [0, 1, 2]


def test_more_iterations_are_made(ppo: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run", "mine"]
    assert main(["fit", *ppo, *run, "--model.iterations", "1"]) == 0
    assert main(["fit", *ppo, *run, "--ckpt_path", "last"]) == 0
    assert [row["step"] for row in metrics("mine") if "policy/loss" in row] == [0, 1, 2]
    capsys.readouterr()
    assert main(["fit", *ppo, *run, "--ckpt_path", "last"]) == 0
    assert "nothing was left to train after step" in capsys.readouterr().out


@pytest.mark.parametrize("end", [["--trainer.max_epochs", "1"], ["--trainer.max_steps", "2"]])
def test_a_run_that_is_past_the_end_that_is_asked_for_says_that_nothing_is_left(
    sft: list[str], capsys: pytest.CaptureFixture[str], end: list[str]
) -> None:
    assert main(["fit", *sft, "--trainer.max_epochs", "3"]) == 0
    rows = metrics("sft")
    capsys.readouterr()
    assert main(["fit", *sft, "--ckpt_path", "last", *end]) == 0
    assert "nothing was left to train after step" in capsys.readouterr().out
    assert metrics("sft") == rows


def test_a_warm_up_longer_than_the_run_is_told(sft: list[str]) -> None:
    with pytest.warns(
        UserWarning, match=r"warmup_steps: 30 are more than the training's 3: .* ends at 10% of its peak"
    ):
        main(["fit", *sft, "--model.optimizer.warmup_steps", "30"])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    sft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *sft, "--checkpoint.every_n_batches", "1"]) == 0
    newest = FOLDER / "batch-00000003.ckpt"
    flipped = bytearray(newest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newest.write_bytes(flipped)
    capsys.readouterr()
    assert main(["fit", *sft, "--ckpt_path", str(newest)]) == 2
    assert "this checkpoint is damaged (it has changed since it was written)" in error_of(capsys)
    assert main(["fit", *sft, "--ckpt_path", "last"]) == 0
    assert said(capsys, "run")[0] == (
        "runs/sft goes on from batch-00000002.ckpt; newer ones are damaged (batch-00000003.ckpt: it has changed since "
        "it was written)"
    )


class Hostile:
    """What a checkpoint could run if it were loaded as any pickle."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": Hostile()}, "the file asks for posix.mkdir; take a checkpoint of this library"),
        ([1, 2], "the file is no checkpoint of a training (TypeError"),
        ({"weight": torch.zeros(2)}, "the file is no checkpoint of a training (it has no 'pytorch-lightning_version')"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line(
    content: Any, message: str, sft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, "other.ckpt")
    assert main(["fit", *sft, "--ckpt_path", "other.ckpt"]) == 2
    assert message in error_of(capsys)
    assert not Path("made").exists()


def test_loading_what_can_run_code_is_refused(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft, "--weights_only", "false"]) == 2
    assert "--weights_only false: a checkpoint read so can run any code" in error_of(capsys)
