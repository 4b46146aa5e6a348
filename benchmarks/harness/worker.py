"""The one worker: a side of a comparison in a process of its own, asked by lines of JSON.

    python -m harness.worker MODULE ARGUMENT ...

The process calls ``MODULE.serve(*ARGUMENTS)``, which gives a greeting and a function from questions to answers. An
answer with the key ``refused`` says why this side cannot take part.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.install import INSTALLED, missing

BENCHMARKS = Path(__file__).resolve().parent.parent
NATIVE = {"RLHF_LIGHTNING_OPS": "native"}  # for ours: a reference must not pass for the operator
Answer = dict[str, Any]
Serve = tuple[Answer, Callable[..., Answer]]


class Refused(Exception):
    """A side cannot take part; the message says why."""


class Worker:
    """The process of one side.

    Args:
        module: with the function `serve`; ``arguments`` are for it.
        threads: of its arithmetic.
        folder: of build/peers, first on its path; Refused where it is not there.
        environment: further variables.
        limit: seconds for one answer; None for all that it takes.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        threads: int,
        folder: str | None = None,
        environment: dict[str, str] | None = None,
        limit: float | None = None,
    ) -> None:
        if reason := missing(folder):
            raise Refused(reason)
        self.limit = limit
        places = [*([INSTALLED / folder] if folder else []), BENCHMARKS, BENCHMARKS.parent]
        path = os.pathsep.join([*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.worker", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env={**variables, **(environment or {})},
            text=True,
        )
        self.greeting: Answer | None = None

    def greet(self) -> Answer:
        """Waits until the process is there, and gives its greeting; raises Refused."""
        if self.greeting is None:
            self.greeting = self._answer()
        return self.greeting

    def ask(self, **question: Any) -> Answer:
        """The answer to one question; raises Refused, after which the process may be gone."""
        self.greet()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is what _answer finds
        return self._answer()

    def _answer(self) -> Answer:
        channel = self.process.stdout
        assert channel is not None
        if not select.select([channel], [], [], self.limit)[0]:
            self.close()
            raise Refused(f"no answer within {self.limit:.0f} s")
        line = channel.readline()
        if not line:
            self.close()
            self.complaints.seek(0)
            said = self.complaints.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise Refused(f"its process ended ({self.process.returncode}): {said[-1]}")
        message: Answer = json.loads(line)
        if "refused" in message:
            raise Refused(message["refused"])
        return message

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def once(module: str, question: dict[str, Any], **start: Any) -> Answer:
    """The answer of a process that is there for one question; ``start``: see `Worker`. Raises Refused."""
    worker = Worker(module, **start)
    try:
        return worker.ask(**question)
    finally:
        worker.close()


def main() -> None:
    """The worker's side."""
    # The answers' channel is ours alone: whatever a peer prints goes to the standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Answer) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        greeting, answer = importlib.import_module(sys.argv[1]).serve(*sys.argv[2:])
    except Exception as error:
        return say(refusal(error))
    say(greeting)
    for line in sys.stdin:
        try:
            message = answer(**json.loads(line))
        except Exception as error:  # a peer may fail in any way; the benchmark goes on without it and says so
            message = refusal(error)
        gc.collect()
        say(message)
    return None


def refusal(error: Exception) -> Answer:
    """An exception's kind and first line, as an answer."""
    return {"refused": f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"}


if __name__ == "__main__":
    main()
