"""What a run must know of SLURM: its job, whether the job was requeued, and how to requeue it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from rlhf_lightning.text import notice, say

MARK = "slurm_job"  # a file in the folder of a run: the job that began it


def job() -> str:
    """The number of this process's job, with that of its task in an array; empty outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")


def mark(folder: Path, command: str) -> None:
    """Writes into a run's folder that this job has begun it, by this command: a job may have several."""
    if job():
        (folder / MARK).unlink(missing_ok=True)
        (folder / MARK).write_text(f"{job()}\n{command}\n", encoding="utf-8")


def begun_before(folder: Path, command: str) -> bool:
    """Whether this job was requeued, and began the run in a folder before that by the same command."""
    try:
        restarted = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        return restarted and (folder / MARK).read_text(encoding="utf-8") == f"{job()}\n{command}\n"
    except (OSError, ValueError):
        return False


def requeue() -> None:
    """Asks SLURM to start this job again, and says what came of it."""
    try:
        done = subprocess.run(["scontrol", "requeue", job()], capture_output=True, text=True, timeout=60, check=False)
        wrong = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = str(error)
    if wrong:
        said = f"job {job()} could not be requeued ({wrong}); submit it again with --ckpt_path last"
    else:
        said = f"job {job()} is requeued, and goes on by itself"
    say(notice("slurm", said))
