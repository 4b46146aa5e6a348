"""The one clock and the one reader of memory: of calls on a CPU and on a GPU, and of the steps of a training."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Call = Callable[[], object]
MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FLUSHED = 1 << 28  # bytes written between calls on a GPU, several times its L2


def now(device: str) -> float:
    """Seconds; on a GPU, once it has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Call, device: str) -> float:
    """Of one call, the device's work included."""
    began = now(device)
    call()
    return now(device) - began


def median_seconds(call: Call, device: str, count: int = 5) -> float:
    """The median of ``count`` calls after one that is not counted."""
    return statistics.median([seconds(call, device) for _ in range(count + 1)][1:])


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(1 << (26 if device == "cpu" else 29), device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def timed(call: Call, count: int, device: str) -> list[float]:
    """``count`` times of a call in milliseconds, after one that is not counted; dropping its results is part of it.

    On a GPU by events, the L2 cache overwritten before each: what the GPU waits for the host is part of the time, as it
    is for users.
    """
    call()
    if device == "cpu":
        return [1e3 * seconds(call, device) for _ in range(count)]
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    events = []
    for _ in range(count):
        flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def first_calls(call: Call, count: int, release: Call) -> list[float]:
    """``count`` times of a call on a CPU in milliseconds, each after ``release`` gave back the memory that was kept."""
    times = []
    for _ in range(count):
        release()
        times.append(1e3 * seconds(call, "cpu"))
    return times


class Graph:
    """Calls captured in one CUDA graph, each on inputs of its own that together exceed the L2 cache.

    Without the host's part, so that a small operator can be compared with a copy captured in the same way. ``stages``
    are run in order, each captured in a graph of its own; those whose ``counted`` is False are no part of the call.
    """

    def __init__(self, stages: Sequence[Call], counted: Sequence[bool]) -> None:
        self.results = []  # their memory belongs to the graphs
        self.graphs = []
        self.counted = counted
        pool = torch.cuda.graph_pool_handle()
        for stage in stages:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.results.append(stage())
            self.graphs.append(graph)
        self.replay_all()

    def replay_all(self) -> None:
        for graph in self.graphs:
            graph.replay()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        for graph, counts in zip(self.graphs, self.counted, strict=True):
            if counts:
                graph.replay()


def graph_copies(size: int) -> int:
    """How many inputs of ``size`` bytes it takes to exceed the L2 cache four times over, at most 24."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(24, -(-4 * cache // size)))


# Memory


def start_peak(device: str, release: Call = lambda: None) -> int:
    """From here on the peak counts; the bytes that are held now. ``release`` gives back what is kept for later calls.

    Raises OSError on a CPU where there is no /proc to read from: Linux has it.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    release()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide the same amount asked for again
    RESET.write_text("5")
    return resident("VmRSS")


def read_peak(device: str) -> int:
    """Bytes: the largest resident set, or the most that was allocated on the GPU, since `start_peak`.

    What a CUDA graph writes while it replays counts as free after its capture, and is not in it: it is in what the
    allocator holds.
    """
    if device == "cpu":
        return resident("VmHWM")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024


def peak_mb(call: Call, device: str, release: Call) -> float | None:
    """MiB that a call holds at its peak beyond what was there before it and the tensors that it returns.

    None on a CPU that is not Linux's.
    """
    if device == "cpu" and not (STATUS.exists() and RESET.exists()):
        return None
    before = start_peak(device, release)
    results = call()
    peak = read_peak(device) - before
    tensors = results if isinstance(results, (tuple, list)) else ()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return max(0.0, peak - sum(storages.values())) / MIB


def state_bytes(models: Iterable[nn.Module], optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the models' parameters and buffers, of the gradients of what is trained, of the optimizer's state.

    Counted from the tensors' shapes and dtypes, a shared tensor once. Gradients count as the parameters that the
    optimizer has, whether they are there at the moment or not.
    """
    tensors = {t.data_ptr(): t for model in models for t in (*model.parameters(), *model.buffers())}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return {
        "models": sum(t.nbytes for t in tensors.values()),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": sum(t.nbytes for t in states),
    }


# The steps of a training


class Meter:
    """Hears of the end of every step: the first ones warm up, the next are timed, and the last are taken apart.

    The peak is that of the timed steps. Phases are noted in the last steps alone, since on a GPU a clock has to wait
    for the device at both ends of each.

    Args:
        device: ``cpu`` or ``cuda``.
        warm_up, timed, apart: how many steps of each kind.
        rest: what the part of a step outside all phases is called.
    """

    def __init__(self, device: str, warm_up: int, timed: int, apart: int, rest: str = "other") -> None:
        self.rest = rest
        self.device, self.warm_up, self.timed, self.apart = device, warm_up, timed, apart
        self.steps = 0  # that have ended
        self.seconds: list[float] = []  # of the timed steps
        self.phases: list[dict[str, float]] = []  # of the steps taken apart
        self.work: list[dict[str, Any]] = []  # of every step: what was done in it
        self.peak_bytes: int | None = None
        self.reserved_bytes = 0  # on a GPU
        self.library_bytes = 0 if device != "cpu" else resident("VmRSS")  # before the models are there
        self._open: AbstractContextManager[None] | None = None
        self._now: dict[str, float] = defaultdict(float)
        self._done: dict[str, Any] = defaultdict(float)

    @property
    def total(self) -> int:
        """Steps to make."""
        return self.warm_up + self.timed + self.apart

    def begin(self) -> None:
        """The first step starts."""
        self._prepare()
        self._began = now(self.device)

    def add(self, **amounts: float | Tensor) -> None:
        """Note work of this step: tokens, optimizer steps, scores; tensors are read when all steps are done."""
        for name, amount in amounts.items():
            self._done[name] += amount

    def step_ended(self) -> None:
        """One step has ended, and the next one starts."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
        took = now(self.device) - self._began
        number, self.steps = self.steps, self.steps + 1
        if self.warm_up <= number < self.warm_up + self.timed:
            self.seconds.append(took)
        elif number >= self.warm_up + self.timed:
            self.phases.append({**self._now, self.rest: took - sum(self._now.values())})
        self.work.append(dict(self._done))
        self._now.clear()
        self._done.clear()
        self._prepare()
        self._began = now(self.device)

    def _prepare(self) -> None:
        if self.steps == self.warm_up:
            start_peak(self.device)
        elif self.steps == self.warm_up + self.timed and self.peak_bytes is None:
            self.peak_bytes = read_peak(self.device)
            if self.device != "cpu":
                self.reserved_bytes = torch.cuda.max_memory_reserved()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block's seconds as the phase's, in the steps that are taken apart."""
        if self.steps < self.warm_up + self.timed:
            yield
            return
        began = now(self.device)
        yield
        self._now[name] += now(self.device) - began

    def clocked(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, its seconds counted as the phase's."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return inside

    def phase_to_the_end(self, name: str) -> None:
        """What is left of this step is the phase's; a phase that is open already stays."""
        if self._open is None:
            self._open = self.phase(name)
            self._open.__enter__()

    def result(self, models: Iterable[nn.Module], optimizer: Optimizer) -> dict[str, Any]:
        """What the side reports; call it after the last step, while the models are there."""
        held = state_bytes(models, optimizer)
        assert self.peak_bytes is not None and self.steps == self.total
        return {
            "seconds": self.seconds,
            "peak_mb": (self.peak_bytes - sum(held.values())) / MIB,
            "libraries_mb": self.library_bytes / MIB,
            "reserved_mb": self.reserved_bytes / MIB,
            "state_mb": {name: size / MIB for name, size in held.items()},
            "phases": self.phases,
            "work": [{name: float(amount) for name, amount in step.items()} for step in self.work],
        }
