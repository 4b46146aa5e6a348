"""Collective operations over all processes. Without a process group they act as for a single process."""

from __future__ import annotations

import json
import math
import re
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_lightning.errors import InputError, ProcessFailed, RolloutDropped, TrainingDiverged

# How gloo and NCCL say that another process is gone or does not answer.
_PEER = re.compile(r"Connection (closed|reset)|Broken pipe|Timed out|timed out|timeout|remote process|NCCL", re.I)
_PLACE = re.compile(r"^\[\S+\] ")  # in their sources
_FIRST, _PATIENCE = "rlhf_lightning/first_failure", 3.0  # seconds


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _initialised() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the tensor's device and in its dtype (float64 too); the input is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes; the input is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def largest(count: int) -> int:
    """The largest ``count`` of all processes."""
    return int(all_reduce_max(torch.tensor(count)))


def rounds(parts: int, together: bool = True) -> Iterator[tuple[int, bool, bool]]:
    """The rounds over ``parts`` micro-batches, as (number, whether it counts, whether it is the last round).

    Sharded models exchange their weights in every pass, so all processes must make the same number of passes. A process
    without parts left repeats its first one, uncounted, until the others are done. There is at least one round.

    Args:
        parts: the number of micro-batches on this process.
        together: False if the processes need not make the same number of rounds.
    """
    total = max(1, largest(parts) if together else parts)
    for number in range(total):
        yield (number if number < parts else 0), number < parts, number == total - 1


def any_true(flag: bool) -> bool:
    """Whether the flag is set on any process: the same answer on all of them."""
    return bool(all_reduce_max(torch.tensor(int(flag))).item()) if world_size() > 1 else flag


def all_gather_objects(value: Any) -> list[Any]:
    """The values of all processes in order of rank (strings, dicts and the like; pickled between trusted processes)."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Waits until all processes have called this."""
    any_true(False)


@contextmanager
def failing_together() -> Iterator[None]:
    """If the block raises an error on one process, raises it on all, so that no process waits for a stopped one.

    It is for a block that every process enters and that may fail on a single one (a user's function, a NaN). After the
    failure the block must make no collective. `InputError`, `TrainingDiverged` and `RolloutDropped` keep their class,
    and name the first process that failed. Other errors are raised unchanged where they happened, and as a RuntimeError
    elsewhere.
    """
    if world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not any_true(error is not None):
        return
    kinds = (InputError, TrainingDiverged, RolloutDropped)
    kind = next((known for known in kinds if isinstance(error, known)), RuntimeError)
    text = f"{type(error).__name__}: {error}" if kind is RuntimeError else str(error)
    failures = enumerate(all_gather_objects(None if error is None else (kind, text)))
    if error is not None and kind is RuntimeError:
        raise error
    for number, failure in failures:
        if failure is not None:
            raise failure[0](f"process {number}: {failure[1]}") from error


def first_failure(error: Exception) -> Exception | None:
    """Who made this process fail: the error of another one, which ended before; None if it is this process's own.

    A process that ends closes its connections, and one that stands still answers no collective within the strategy's
    timeout. The others then fail too, with an error that does not say why. So every process leaves its own error in
    the store that they share. Call this once, where a run has failed.
    """
    if isinstance(error, dist.DistStoreError) and not _initialised():
        return ProcessFailed(f"the processes of the run did not find each other ({error}); were all of them started?")
    if world_size() == 1:
        return None
    is_own = not (_raised_by_torch(error) and _PEER.search(str(error)))
    try:
        store = _store()
        if is_own:
            kind = type(error).__name__ if isinstance(error, InputError | TrainingDiverged) else ""
            text = str(error) if kind else f"{type(error).__name__}: {error}"
            store.compare_set(_FIRST, "", json.dumps([rank(), kind, text]))
            return None
        left = time.monotonic() + _PATIENCE
        while not store.check([_FIRST]) and time.monotonic() < left:
            time.sleep(0.1)
        number, kind, text = json.loads(store.get(_FIRST)) if store.check([_FIRST]) else (None, "", "")
    except RuntimeError:  # the process that holds the store is gone
        number = None
    if is_own:
        return None
    if number is None:
        why = _PLACE.sub("", " ".join(str(error).split())).partition(". ")[0][:160]
        return ProcessFailed(
            f"another process of the run has ended, or stands still ({why}); --ckpt_path last goes on from the last "
            "checkpoint"
        )
    classes: dict[str, type[Exception]] = {known.__name__: known for known in (InputError, TrainingDiverged)}
    return classes.get(kind, ProcessFailed)(f"process {number}: {text}")


def _raised_by_torch(error: Exception) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__", "")).startswith("torch.")


def raise_flag(name: str) -> None:
    """Raises a flag in the store that the processes share, for `flag_raised`. No process waits for another."""
    if world_size() > 1:
        _store().set(name, "")


def flag_raised(name: str) -> bool:
    """Whether any process has raised this flag."""
    return world_size() > 1 and bool(_store().check([name]))


def lower_flag(name: str) -> None:
    """Lowers the flag, whoever raised it."""
    if world_size() > 1:
        _store().delete_key(name)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The 2-norm of all gradients together, over all shards: the same number on every process; 0 without gradients."""
    grads = [p.grad.detach() for p in parameters if p.grad is not None]
    norms = []
    for group in ([g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)]):
        if group:
            total = torch.nn.utils.get_total_norm([_norms(g) for g in group])
            norms.append(float(total.full_tensor() if isinstance(total, DTensor) else total))
    return math.sqrt(sum(norm * norm for norm in norms))


def _norms(x: Tensor) -> Tensor:
    """``x``, or the norms of its rows, which have the same norm. On a CPU torch is four times as fast with rows."""
    rows = not isinstance(x, DTensor) and x.device.type == "cpu" and x.dim() > 1
    return torch.linalg.vector_norm(x, dim=-1) if rows else x


def scale_grads(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies every gradient, also sharded ones, by ``factor``, in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(tensor: Tensor, op: Any) -> Tensor:
    if world_size() == 1:
        return tensor.clone()
    # NCCL reduces only GPU tensors.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
    reduced = tensor.detach().to(device, copy=True).contiguous()
    dist.all_reduce(reduced, op=op)
    return reduced.to(tensor.device)
