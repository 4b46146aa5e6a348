"""Two processes of a run end together: what one of them does wrong is the last line, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAILING = """
from lightning.pytorch import Callback
from rlhf_lightning.errors import InputError

class Fail(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1:
            raise InputError("mine.txt: line 3 is empty")
"""
STANDING_STILL = """
import os, signal
from lightning.pytorch import Callback

class Fail(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1:
            open("stopped", "w").write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
"""
STRATEGY = ["--trainer.strategy", "rlhf_lightning.distributed.FSDP2Strategy", "--trainer.strategy.timeout", "00:00:45"]


@pytest.mark.parametrize(
    ("code", "options", "exit_code", "said"),
    [
        (FAILING, ["--trainer.strategy", "ddp"], 2, "error: process 1: mine.txt: line 3 is empty"),
        (STANDING_STILL, STRATEGY, 1, "error: another process of the run has ended, or stands still (Timed out"),
    ],
    ids=["fails", "stands still"],
)
def test_one_of_two_processes_ends_the_run_with_one_line(
    code: str, options: list[str], exit_code: int, said: str, sft: list[str]
) -> None:
    Path("failing.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "rlhf_lightning", "fit", *sft, *options, "--trainer.devices", "2"]
    command += ["--trainer.callbacks+=failing.Fail"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == exit_code, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr
    if Path("stopped").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path("stopped").read_text(encoding="utf-8")), signal.SIGCONT)
    assert time.monotonic() - began < 200
