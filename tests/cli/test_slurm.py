"""A job of SLURM: its warning saves and requeues, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_runs import metrics

from rlhf_lightning.cli import main
from rlhf_lightning.modules.sft import SFTModule

RUN = ["--model.optimizer.schedule", "constant", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of a job of one process, and a ``scontrol`` that keeps what it is told."""
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >> told\n')
    (folder / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    job = {"JOB_ID": "77", "JOB_NAME": "align", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in {**job, "NODEID": "0", "NNODES": "1", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return monkeypatch


@contextmanager
def stopping(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> Iterator[None]:
    """The second batch of SFT gets these signals."""
    step = SFTModule.training_step

    def signalled(self: SFTModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(SFTModule, "training_step", signalled)
        yield


@pytest.mark.parametrize("name", [[], ["--run", "mine"]])
@pytest.mark.parametrize("signals", [[signal.SIGUSR1], [signal.SIGUSR1, signal.SIGTERM]])
def test_a_warning_saves_and_requeues_and_the_same_command_goes_on(
    sft: list[str], slurm: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: list[str], signals: list[int]
) -> None:
    with stopping(slurm, *signals):
        assert main(["fit", *sft, *RUN, *name]) == 143
    assert Path("told").read_text() == "requeue 77\n"
    assert "job 77 is requeued" in capsys.readouterr().out
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    assert main(["fit", *sft, *RUN, *name]) == 0
    run = "mine" if name else "sft"
    said = capsys.readouterr().out
    assert f"runs/{run} goes on from batch-00000002.ckpt: SLURM's job was requeued" in said
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == [0, 1, 2]
    # The run of another job is not gone on with.
    slurm.setenv("SLURM_JOB_ID", "78")
    assert main(["fit", *sft, *RUN, *name]) == (2 if name else 0)
    assert Path("runs/sft-2").exists() == (not name)


@pytest.mark.parametrize("name", [[], ["--run", "mine"]])
def test_a_job_that_was_killed_before_its_first_checkpoint_begins_anew_in_its_own_folder(
    sft: list[str], slurm: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: list[str]
) -> None:
    assert main(["fit", *sft, *RUN, *name]) == 0
    run = Path("runs") / ("mine" if name else "sft")
    first = metrics(run.name)
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "model")
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main(["fit", *sft, *RUN, *name]) == 0
    assert f"{run} begins anew: SLURM's job was requeued before its first checkpoint" in capsys.readouterr().out
    assert [row["step"] for row in metrics(run.name)] == [row["step"] for row in first]
    assert (run / "unsaved" / "metrics.jsonl").exists()
    assert [path.name for path in Path("runs").iterdir()] == [run.name]


def test_a_cancelled_job_saves_and_is_not_requeued(sft: list[str], slurm: pytest.MonkeyPatch) -> None:
    with stopping(slurm, signal.SIGTERM):
        assert main(["fit", *sft, *RUN]) == 143
    assert not Path("told").exists()
    assert [path.name for path in Path("runs/sft/checkpoints").glob("*.ckpt")] == ["batch-00000002.ckpt"]


def test_a_requeue_that_fails_is_told(
    sft: list[str], slurm: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bin/scontrol").write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    with stopping(slurm, signal.SIGUSR1):
        assert main(["fit", *sft, *RUN]) == 143
    assert "could not be requeued (no permission); submit it again with --ckpt_path last" in capsys.readouterr().out


def test_of_several_runs_of_a_job_each_command_goes_on_with_its_own(
    sft: list[str], slurm: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [[*RUN, "--model.optimizer.learning_rate", rate] for rate in ("1e-3", "1e-4", "1e-5")]
    assert main(["fit", *sft, *rates[0]]) == 0
    with stopping(slurm, signal.SIGUSR1):
        assert main(["fit", *sft, *rates[1]]) == 143
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    for rate in rates:
        assert main(["fit", *sft, *rate]) == 0
    runs = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert list(dict.fromkeys(run.rstrip(":") for run in runs)) == ["runs/sft", "runs/sft-2", "runs/sft-3"]
