"""One case after another: every entrant in a process of its own, timed in turns so that noise hits all alike."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from installed import INSTALLED

from operators.cases import LIMIT, Case
from operators.entrants import ENTRANTS, OURS
from operators.limits import work

BENCHMARKS = Path(__file__).resolve().parent.parent
TIME_LIMIT = 240.0  # seconds for one answer: compiling is the longest
FIRST_CALLS = 5
BUDGET_MS = 60.0  # of a turn: a fast operator is timed more often


class Refused(Exception):
    """An entrant cannot take part; the message says why."""


class Worker:
    """The process of one entrant, in one environment."""

    def __init__(self, name: str, device: str, threads: int, environment: dict[str, str]) -> None:
        entrant = ENTRANTS[name]
        reason = entrant.missing()
        if reason:
            raise Refused(reason)
        folders = ([INSTALLED / entrant.folder] if entrant.folder else []) + [BENCHMARKS, BENCHMARKS.parent]
        path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, **environment}
        if name == OURS:
            variables["RLHF_LIGHTNING_OPS"] = "native"  # a reference must not pass for the operator
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "operators.worker", name, device, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env=variables,
            text=True,
        )
        self.version = ""

    def greet(self) -> None:
        """Waits until the process is there; raises Refused."""
        self.version = self._answer()["version"]

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to one question; raises Refused, after which the process may be gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is what _answer finds
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        channel = self.process.stdout
        assert channel is not None
        if not select.select([channel], [], [], TIME_LIMIT)[0]:
            self.close()
            raise Refused(f"no answer within {TIME_LIMIT:.0f} s")
        line = channel.readline()
        if not line:
            self.close()
            self.complaints.seek(0)
            said = self.complaints.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise Refused(f"its process ended ({self.process.returncode}): {said[-1]}")
        message: dict[str, Any] = json.loads(line)
        if "refused" in message:
            raise Refused(message["refused"])
        return message

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Workers:
    """The processes of all entrants of ``cases``, started at once and kept to the end.

    ``missing``: entrants of which there is none, and why.
    """

    def __init__(self, cases: list[Case], device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.missing: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._workers: dict[tuple[Any, ...], Worker] = {}
        needed = [(name, case.environment) for case in cases for name in (OURS, LIMIT, *case.peers)]
        for greeting in (False, True):  # they start side by side, and none still starts when the first is timed
            for name, environment in needed:
                try:
                    self._start(name, environment, greeting)
                except Refused as refused:
                    self.missing[name] = str(refused)

    def _start(self, name: str, environment: dict[str, str], greeting: bool) -> None:
        key = (name, *environment.items())
        if name not in self.missing and key not in self._workers:
            self._workers[key] = Worker(name, self.device, self.threads, environment)
        if greeting and key in self._workers and not self._workers[key].version:
            self._workers[key].greet()
            self.versions[name] = self._workers[key].version

    def worker(self, name: str, environment: dict[str, str]) -> Worker:
        """A process that answers; raises Refused. One that ended in an earlier case is started again."""
        if name in self.missing:
            raise Refused(self.missing[name])
        key = (name, *environment.items())
        if not self._workers[key].alive:
            del self._workers[key]
            self._start(name, environment, greeting=True)
        return self._workers[key]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def measure(case: Case, workers: Workers, rounds: int, least: int, seed: int) -> dict[str, Any]:
    """One row of the results, each time the median of ``least`` calls or more, in ``rounds`` turns."""
    taking_part: dict[str, Worker] = {}
    samples: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    memory: dict[str, float | None] = {}
    errors: dict[str, dict[str, float]] = {}
    not_timed: dict[str, str] = {}

    def attempt(name: str, **question: Any) -> dict[str, Any] | None:
        try:
            worker = taking_part.get(name) or workers.worker(name, case.environment)
            message = worker.ask(**question)
        except Refused as refused:
            not_timed[name] = str(refused)
            taking_part.pop(name, None)
            times.pop(name, None)
            return None
        taking_part[name] = worker
        return message

    for name in (OURS, LIMIT, *case.peers):
        prepared = attempt(name, do="prepare", case=dataclasses.asdict(case), seed=seed)
        if prepared is None:
            continue
        errors[name] = prepared["errors"]
        samples[name] = max(-(-least // rounds), min(40, int(BUDGET_MS / max(prepared["estimate_ms"], 1e-3))))
        held = attempt(name, do="memory")
        memory[name] = held["mb"] if held else None
    for turn in range(rounds):
        for name in list(taking_part):
            timed = attempt(name, do="time", seed=seed + 1 + turn, samples=samples[name])
            if timed is not None:
                times.setdefault(name, []).extend(timed["ms"])
    first = None
    if OURS in taking_part and case.operator == "token_log_probs" and workers.device == "cpu":
        first = attempt(OURS, do="first calls", samples=FIRST_CALLS)
    for name in list(taking_part):
        attempt(name, do="drop")
    row = _row(case, workers.device, times, memory, errors, not_timed)
    if first is not None:
        row["first_call_ms"] = statistics.median(first["ms"])
    return row


def _row(
    case: Case,
    device: str,
    times: dict[str, list[float]],
    memory: dict[str, float | None],
    errors: dict[str, dict[str, float]],
    not_timed: dict[str, str],
) -> dict[str, Any]:
    median = {name: statistics.median(of_entrant) for name, of_entrant in times.items()}
    peers = {name: median[name] for name in case.peers if name in median}
    row: dict[str, Any] = {
        "operator": case.operator,
        "shape": case.shape,
        "dtype": case.dtype,
        "pass": case.passes,
        "ours_ms": median.get(OURS),
        "limit_ms": median.get(LIMIT),
        "peers": peers,
        "environment": case.environment,
        "limit_does": work(case, device),
        "ours_mb": memory.get(OURS),
        "peers_mb": {name: memory[name] for name in peers},
        "quartiles_ms": {name: _quartiles(times[name]) for name in median},
        "samples": {name: len(times[name]) for name in median},
        "errors": {name: errors[name] for name in median if errors.get(name)},
        "not_timed": not_timed,
    }
    row["goals"] = list(_goals(case, row))
    return row


def _quartiles(times: list[float]) -> list[float]:
    lower, _, upper = statistics.quantiles(times, n=4)
    return [lower, upper]


def _goals(case: Case, row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Each goal with what was reached: None where there was nothing to compare."""
    ours = row["ours_ms"]
    for name, goal in case.goals.items():
        other = row["limit_ms"] if name == LIMIT else row["peers"].get(name)
        if not ours or not other:
            yield {"against": name, "goal": goal, "reached": None, "met": None}
        elif name == LIMIT:
            yield {"against": name, "goal": goal, "reached": ours / other, "met": ours / other <= goal}
        else:
            yield {"against": name, "goal": goal, "reached": other / ours, "met": other / ours >= goal}
    if case.memory_goal is not None:
        reached = row["ours_mb"]
        met = None if reached is None else reached <= case.memory_goal
        yield {"against": "memory", "goal": case.memory_goal, "reached": reached, "met": met}
