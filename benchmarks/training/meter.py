"""Seconds of a step, the peak of its memory, and where its time goes: one meter for every side."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MIB = 2**20


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
        self._now: dict[str, float] = defaultdict(float)
        self._done: dict[str, Any] = defaultdict(float)

    @property
    def total(self) -> int:
        """Steps to make."""
        return self.warm_up + self.timed + self.apart

    def begin(self) -> None:
        """The first step starts."""
        self._prepare()
        self._began = self.clock()

    def add(self, **amounts: float | Tensor) -> None:
        """Note work of this step: tokens, optimizer steps, scores; tensors are read when all steps are done."""
        for name, amount in amounts.items():
            self._done[name] += amount

    def step_ended(self) -> None:
        """One step has ended, and the next one starts."""
        now = self.clock()
        took = now - self._began
        number, self.steps = self.steps, self.steps + 1
        if self.warm_up <= number < self.warm_up + self.timed:
            self.seconds.append(took)
        elif number >= self.warm_up + self.timed:
            self.phases.append({**self._now, self.rest: took - sum(self._now.values())})
        self.work.append(dict(self._done))
        self._now.clear()
        self._done.clear()
        self._prepare()
        self._began = self.clock()

    def _prepare(self) -> None:
        if self.steps == self.warm_up:
            start_peak(self.device)
        elif self.steps == self.warm_up + self.timed and self.peak_bytes is None:
            self.peak_bytes = read_peak(self.device)
            if self.device != "cpu":
                self.reserved_bytes = torch.cuda.max_memory_reserved()

    def clock(self) -> float:
        """Seconds; on a GPU, once it has done all it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block's seconds as the phase's, in the steps that are taken apart."""
        if self.steps < self.warm_up + self.timed:
            yield
            return
        began = self.clock()
        yield
        self._now[name] += self.clock() - began

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


def state_bytes(models: Iterable[nn.Module], optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the models' parameters and buffers, of the gradients of what is trained, of the optimizer's state.

    Counted from the tensors' shapes and dtypes, a shared tensor once. Gradients count as the parameters that the
    optimizer has, whether they are there at the moment or not.
    """
    tensors: dict[int, Tensor] = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            tensors[tensor.data_ptr()] = tensor
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return {
        "models": sum(t.nbytes for t in tensors.values()),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": sum(t.nbytes for t in states),
    }


def start_peak(device: str) -> None:
    """From here on the peak counts."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind is nobody's peak
    Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: str) -> int:
    """Bytes: the largest resident set (Linux), or the most that was allocated on the GPU.

    What a CUDA graph writes while it replays counts as free after its capture, and is not in it: it is in what the
    allocator holds.
    """
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024
