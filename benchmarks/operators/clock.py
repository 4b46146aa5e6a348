"""Times of a call, and the memory it holds at its peak, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]
FLUSHED = 1 << 28  # bytes written between calls on a GPU, several times its L2


def timed(call: Call, count: int, device: str) -> list[float]:
    """``count`` times of a call in milliseconds, after one that is not counted; dropping its results is part of it.

    On a GPU by events, the L2 cache overwritten before each: what the GPU waits for the host is part of the time, as it
    is for users.
    """
    call()
    if device == "cpu":
        return _timed_on_cpu(call, count)
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
        times += _timed_on_cpu(call, 1)
    return times


def _timed_on_cpu(call: Call, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
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


def peak_mb(call: Call, device: str, release: Call) -> float | None:
    """MiB that a call holds at its peak beyond what was there before it and the tensors that it returns.

    On a CPU the resident set's high-water mark (Linux; None elsewhere), after ``release`` gave back what the entrant
    keeps for its next call; on a GPU the mark of the caching allocator.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not (status.exists() and reset.exists()):
            return None
        release()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide the same amount asked for again
        reset.write_text("5")
        before = _kib(status, "VmRSS")
        results = call()
        peak = (_kib(status, "VmHWM") - before) * 1024
    return max(0.0, peak - _size_of(results)) / 2**20


def _kib(status: Path, name: str) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1])


def _size_of(results: object) -> int:
    tensors = results if isinstance(results, (tuple, list)) else ()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
