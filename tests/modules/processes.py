"""Runs a script in processes of its own, and a file of cases in several: the test's side, and the processes' side."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from rlhf_lightning.collectives import rank

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
# What takes long to import. Processes are forked from one that has done so, and starts no thread.
PRELOADED = ["lightning.pytorch", "transformers.models.llama.modeling_llama", "rlhf_lightning.modules"]


def fork_server() -> Any:
    """The context of multiprocessing whose processes have :data:`PRELOADED` already; one a session.

    They keep the variables that the server read on import (``RLHF_LIGHTNING_OPS``), and end without exit handlers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _run_script(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """``python script arguments``, in a forked process."""
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_scripts(script: Path, arguments: list[list[str]], environments: list[dict[str, str]] | None = None) -> None:
    """``python script`` with each list of arguments, all at once; fails with what they said where one of them fails."""
    context = fork_server()
    shared = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(number)) for number in range(len(arguments))]
        running = [
            context.Process(target=_run_script, args=(str(script), own, {**shared, **added}, str(output)))
            for own, added, output in zip(arguments, environments or [{}] * len(arguments), outputs, strict=True)
        ]
        try:
            for process in running:
                process.start()
            deadline = time.monotonic() + 600
            for process in running:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in running]  # None: it is still running
        finally:
            for process in running:
                if process.is_alive():
                    process.kill()
        said = "\n".join(output.read_text(errors="replace") for output in outputs if output.exists())
    assert codes == [0] * len(codes), f"exit codes {codes}\n{said[-6000:]}"


def free_port() -> int:
    """A free port below those that the system gives to connections, so that none takes it before it is used."""
    # A command seeds `random`: two workers would try the same ports at the same time.
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports are taken")


def launch(script: Path, argument: Path, processes: int = 2) -> None:
    """Start ``script argument`` as torchrun would, in every process; fails as :func:`run_scripts` does."""
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
    }
    own = [{**shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(processes)]
    run_scripts(script, [[str(argument)]] * processes, own)


def results_of(script: str, cases: dict[str, dict[str, Any]], folder: Path, processes: int = 2) -> dict[str, Any]:
    """What :func:`run_cases` got on process 0 from the cases, in ``script`` beside this file."""
    job, out = folder / "job.json", folder / "out.pt"
    job.write_text(json.dumps({"out": str(out), "cases": cases}))
    launch(HERE / script, job, processes)
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
