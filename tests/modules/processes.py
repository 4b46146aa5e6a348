"""Runs a file of cases in two processes: the test's side, which starts them, and theirs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_lightning.collectives import rank

HERE = Path(__file__).parent


def launch(script: Path, argument: Path, processes: int = 2) -> None:
    """Start ``script argument`` as torchrun would, in every process; fails with the output of the first that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(argument)],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(outputs)[-6000:]


def results_of_two(script: str, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What :func:`run_cases` got on process 0 from the cases, in ``script`` beside this file."""
    job, out = folder / "job.json", folder / "out.pt"
    job.write_text(json.dumps({"out": str(out), "cases": cases}))
    launch(HERE / script, job)
    results: dict[str, Any] = torch.load(out, weights_only=True)
    return results


def run_cases(run: Callable[[dict[str, Any]], Any]) -> None:
    """The main function of a script of cases: run all that the command line's JSON file names, one after the other."""
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run(case) for name, case in job["cases"].items()}
    if rank() == 0:
        torch.save(results, job["out"])
    if dist.is_initialized():
        dist.destroy_process_group()  # gloo's threads are joined; at exit they may end the process with an abort
