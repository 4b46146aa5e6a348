"""One case after another: every entrant in a process of its own, checked, and timed in turns so that noise hits all.

The process of an entrant answers ``{"do": "prepare", "case": ..., "seed": ...}``, ``{"do": "memory"}``, ``{"do":
"time", "seed": ..., "samples": ...}``, ``{"do": "first calls", "samples": ...}`` and ``{"do": "drop"}``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import clock
from harness.worker import NATIVE, Refused, Serve, Worker
from torch import Tensor

from operators import cases, sides
from operators.cases import BACKWARD, BOTH, ENTRANTS, FORWARD, LIMIT, OURS, TRL_LOOP, VERL_LOOP, Case
from operators.inputs import TOLERANCE, Inputs, allocate, errors

WARM_UP = 2
LOOPS = (TRL_LOOP, VERL_LOOP)  # thousands of launches: on a GPU they are timed as they are used, not in a graph
TIME_LIMIT = 240.0  # seconds for one answer: compiling is the longest
FIRST_CALLS = 5
BUDGET_MS = 60.0  # of a turn: a fast operator is timed more often


# The process of one entrant


class Run:
    """One case of one entrant: ``call`` is what is timed, ``calls`` how often it does the work."""

    def __init__(self, name: str, case: Case, device: str, seed: int) -> None:
        self.case, self.device, self.calls = case, device, 1
        self.inputs: list[Inputs] = []
        self.errors: dict[str, float] = {}
        self.renew: Callable[[], object] = lambda: None  # what must be done again once the inputs have changed
        small = not ("V" in case.shape or name in LOOPS)
        copies = clock.graph_copies(cases.bytes_moved(case)) if device != "cpu" and small else 0
        if name == LIMIT:
            self.single = cases.limit(case, device)
            copied = [cases.limit(case, device) for _ in range(copies)]
            self.call = self._graph([lambda: [copy() for copy in copied]], [True], copies) if copies else self.single
            return
        build = getattr(sides, ENTRANTS[name].function)
        self.inputs = [allocate(case, device) for _ in range(max(1, copies))]
        self.draw(seed)
        forwards = [build(inputs) for inputs in self.inputs]
        self._check(forwards[0], seed)
        self.single = self._single(forwards[0])
        self.call = self._graphed(forwards) if copies else self.single

    def draw(self, seed: int) -> None:
        for number, inputs in enumerate(self.inputs):
            inputs.draw(1000 * seed + number)
        self.renew()

    def _check(self, forward: Callable[[], dict[str, Tensor]], seed: int) -> None:
        inputs, outputs = self.inputs[0], forward()
        gradients = self._backward(inputs, outputs)(outputs) if self.case.passes != FORWARD and inputs.leaves else ()
        pairs = zip(gradients, inputs.leaves, strict=False)
        if any(gradient.data_ptr() == leaf.data_ptr() for gradient, leaf in pairs):
            gradients = tuple(gradient.clone() for gradient in gradients)  # made in place of the logits
        self.draw(seed)  # for the same reason
        self.errors = errors(inputs, outputs, gradients)

    @staticmethod
    def _backward(inputs: Inputs, outputs: dict[str, Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """From outputs like these to the gradients; the incoming ones, which are the loss's part, are made here."""
        names = [name for name, tensor in outputs.items() if tensor.requires_grad]
        incoming = tuple(inputs.incoming(name) for name in names)

        def gradients(made: dict[str, Tensor], retain: bool = False) -> tuple[Tensor, ...]:
            trained = tuple(made[name] for name in names)
            return torch.autograd.grad(trained, inputs.leaves, incoming, retain_graph=retain)

        return gradients

    def _single(self, forward: Callable[[], dict[str, Tensor]]) -> Callable[[], object]:
        """The case's pass as one call that returns what it leaves behind."""
        if self.case.passes == FORWARD:
            return lambda: tuple(forward().values())
        kept = forward()
        gradients = self._backward(self.inputs[0], kept)
        if self.case.passes == BACKWARD:
            self.renew = lambda: kept.update(forward())  # autograd refuses inputs that changed since the forward
            return lambda: gradients(kept, retain=True)

        def both() -> tuple[Tensor, ...]:
            outputs = forward()
            return (*gradients(outputs), *outputs.values())

        kept = {}
        return both

    def _graphed(self, forwards: list[Callable[[], dict[str, Tensor]]]) -> clock.Graph:
        kept: list[dict[str, Tensor]] = []
        # On a stream of its own first, as capture asks for: compilation, autotuning and lazy set-up happen here.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                for inputs, forward in zip(self.inputs, forwards, strict=True):
                    outputs = forward()
                    if self.case.passes != FORWARD:
                        self._backward(inputs, outputs)(outputs)
        torch.cuda.current_stream().wait_stream(stream)
        stages: list[Callable[[], object]] = [lambda: kept.extend(forward() for forward in forwards)]
        if self.case.passes != FORWARD:
            # With incoming gradients of its own for each copy: one for all would stay in the L2 cache.
            backwards = [self._backward(inputs, outputs) for inputs in self.inputs]
            stages.append(lambda: [back(made) for back, made in zip(backwards, kept, strict=True)])
        counted = {FORWARD: [True], BACKWARD: [False, True], BOTH: [True, True]}[self.case.passes]
        graph = self._graph(stages, counted, len(forwards))
        graph.results.append(kept)
        return graph

    def _graph(self, stages: list[Callable[[], object]], counted: list[bool], copies: int) -> clock.Graph:
        self.calls = copies
        for _ in range(WARM_UP):
            self.single()
        torch.cuda.synchronize()
        graph = clock.Graph(stages, counted)
        eager = self.renew
        self.renew = lambda: (eager(), graph.replay_all())
        return graph


def serve(name: str, device: str, threads: str) -> Serve:
    """For `harness.worker`; the greeting is the version of the entrant's package."""
    torch.set_num_threads(int(threads))
    version = version_of(ENTRANTS[name].packages)
    held: list[Run] = []

    def answer(do: str, **question: Any) -> dict[str, Any]:
        try:
            return answered(name, device, do, held, **question)
        except Exception:
            held.clear()
            raise
        finally:
            if device != "cpu" and do in ("prepare", "drop"):
                gc.collect()
                torch.cuda.empty_cache()  # the truth in float64 is large, and there are others on this GPU

    return {"version": version}, answer


def version_of(packages: Sequence[str]) -> str:
    """The first of them that is installed, and its version; raises PackageNotFoundError."""
    for package in packages[:-1]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return f"{packages[-1]} {importlib.metadata.version(packages[-1])}"


def answered(
    name: str, device: str, do: str, held: list[Run], case: Any = None, seed: int = 0, samples: int = 1
) -> dict[str, Any]:
    """Does what is asked; ``held`` has the case that was prepared last."""
    if do == "drop":
        held.clear()
        return {}
    if do == "prepare":
        held.clear()
        run = Run(name, Case(**case), device, seed)
        if not max(run.errors.values(), default=0.0) <= TOLERANCE[run.case.dtype]:
            found = ", ".join(f"{tensor} {error:.2g}" for tensor, error in run.errors.items())
            return {"refused": f"wrong: relative error against float64: {found}"}
        held.append(run)
        return {"errors": run.errors, "estimate_ms": clock.timed(run.call, 1, device)[0] / run.calls}
    (run,) = held
    # What gives back the memory that the entrant keeps between calls: peers keep none on a CPU.
    release: Callable[[], object] = sides.release_kept_memory if name == OURS else lambda: None
    if do == "memory":
        return {"mb": clock.peak_mb(run.single, device, release)}
    if do == "first calls":
        return {"ms": clock.first_calls(run.call, samples, release)}
    run.draw(seed)
    return {"ms": [ms / run.calls for ms in clock.timed(run.call, samples, device)]}


# All of them


class Workers:
    """The processes of all entrants of ``table``, started at once and kept to the end.

    ``missing``: entrants of which there is none, and why.
    """

    def __init__(self, table: list[Case], device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.missing: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._workers: dict[tuple[Any, ...], Worker] = {}
        needed = [(name, case.environment) for case in table for name in (OURS, LIMIT, *case.peers)]
        for greeting in (False, True):  # they start side by side, and none still starts when the first is timed
            for name, environment in needed:
                try:
                    self._start(name, environment, greeting)
                except Refused as refused:
                    self.missing[name] = str(refused)

    def _start(self, name: str, environment: dict[str, str], greeting: bool) -> None:
        key = (name, *environment.items())
        if name not in self.missing and key not in self._workers:
            self._workers[key] = Worker(
                "operators.measure",
                *(name, self.device, self.threads),
                threads=self.threads,
                folder=ENTRANTS[name].folder,
                environment={**environment, **(NATIVE if name == OURS else {})},
                limit=TIME_LIMIT,
            )
        if greeting and key in self._workers:
            self.versions[name] = self._workers[key].greet()["version"]

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
    held: dict[str, float | None] = {}
    wrong: dict[str, dict[str, float]] = {}
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
        wrong[name] = prepared["errors"]
        samples[name] = max(-(-least // rounds), min(40, int(BUDGET_MS / max(prepared["estimate_ms"], 1e-3))))
        found = attempt(name, do="memory")
        held[name] = found["mb"] if found else None
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
    row = as_row(case, workers.device, times, held, wrong, not_timed)
    if first is not None:
        row["first_call_ms"] = statistics.median(first["ms"])
    return row


def as_row(
    case: Case,
    device: str,
    times: dict[str, list[float]],
    held: dict[str, float | None],
    errors: dict[str, dict[str, float]],
    not_timed: dict[str, str],
) -> dict[str, Any]:
    """One row of the results: medians of the ``times``, MiB ``held``, goals, and why an entrant was not timed."""
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
        "limit_does": cases.work(case, device),
        "ours_mb": held.get(OURS),
        "peers_mb": {name: held[name] for name in peers},
        "quartiles_ms": {name: statistics.quantiles(of_entrant, n=4)[::2] for name, of_entrant in times.items()},
        "samples": {name: len(of_entrant) for name, of_entrant in times.items()},
        "errors": {name: errors[name] for name in times if errors.get(name)},
        "not_timed": not_timed,
    }
    row["goals"] = [_reached(row, name, goal) for name, goal in case.goals.items()]
    if case.memory_goal is not None:
        row["goals"].append(_reached(row, "memory", case.memory_goal))
    return row


def _reached(row: dict[str, Any], against: str, goal: float) -> dict[str, Any]:
    """A goal with what was reached: None where there was nothing to compare."""
    ours, other = row["ours_ms"], row["limit_ms"] if against == LIMIT else row["peers"].get(against)
    if against == "memory":
        reached = row["ours_mb"]
    elif not ours or not other:
        reached = None
    else:
        reached = ours / other if against == LIMIT else other / ours
    at_most = against in (LIMIT, "memory")
    met = None if reached is None else reached <= goal if at_most else reached >= goal
    return {"against": against, "goal": goal, "reached": reached, "met": met}
