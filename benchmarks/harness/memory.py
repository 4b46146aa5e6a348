"""The one reader of memory: the peak of a process or of a GPU, and what models and optimizers hold."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_peak(device: str, release: Callable[[], object] = lambda: None) -> int:
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


def peak_mb(call: Callable[[], object], device: str, release: Callable[[], object]) -> float | None:
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
