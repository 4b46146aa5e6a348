"""The ``fsdp2`` strategy, and the few collective operations that the modules need. Without a process group every
function here is that of a single process.

Lightning's DDP and PyTorch's FSDP2 both average gradients over the processes; the modules' losses are sums, so
`RLHFModule` multiplies by the process count and divides by the all-reduced count (`modules/base.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rlhf_lightning.errors import InputError, TrainingDiverged


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state sharded over all processes (PyTorch's ``fully_shard``).

    Lightning's ``ModelParallelStrategy`` with its two sizes filled in: all processes are data-parallel. The module
    shards itself in ``configure_model``. Runs on CPUs over gloo as well as on GPUs.

    Args:
        save_distributed_checkpoint: write a folder with one file a process, each its own shards, instead of one file.
        process_group_backend: of torch.distributed; None takes nccl on GPUs and gloo on CPUs.
        timeout: how long a collective may wait for the other processes.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Size the mesh: the numbers of nodes and devices are known by now, they were not in the constructor."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Sharded training with PyTorch's FSDP2")


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if _initialised() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the tensor's device and in its dtype (float64 too); the input is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes; the input is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


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
    """Wait until every process is here."""
    any_true(False)


@contextmanager
def failing_together() -> Iterator[None]:
    """What the block raises on one process is raised on all, so that none waits for one that has stopped.

    For a block that every process enters and that may fail on one alone (a user's function, a NaN), with no collective
    left to make after the failure. `InputError` and `TrainingDiverged` are raised as such, with the number of the first
    process that failed; anything else as it is where it happened, and as a RuntimeError elsewhere.
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
    kind = next((known for known in (InputError, TrainingDiverged) if isinstance(error, known)), RuntimeError)
    text = f"{type(error).__name__}: {error}" if kind is RuntimeError else str(error)
    failures = enumerate(all_gather_objects(None if error is None else (kind, text)))
    if error is not None and kind is RuntimeError:
        raise error
    for number, failure in failures:
        if failure is not None:
            raise failure[0](f"process {number}: {failure[1]}") from error


@contextmanager
def gradient_sync(module: LightningModule, on: bool) -> Iterator[None]:
    """Whether ``backward`` inside adds the gradients up over the processes; off on all but the last micro-batch.

    With it off, DDP and FSDP2 keep adding local gradients, which the next backward with it on reduces once. For manual
    optimisation; under automatic optimisation Lightning does this.
    """
    strategy_model = module.trainer.strategy.model
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if on:
        yield
    elif isinstance(strategy_model, DistributedDataParallel):
        with strategy_model.no_sync():
            yield
    else:
        for part in sharded:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in sharded:
                part.set_requires_gradient_sync(True, recurse=False)


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
    """``x``, or the norms of its rows, which have the same norm: on a CPU torch is four times as fast at those."""
    rows = not isinstance(x, DTensor) and x.device.type == "cpu" and x.dim() > 1
    return torch.linalg.vector_norm(x, dim=-1) if rows else x


def scale_grads(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by ``factor``, in place; sharded gradients too."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(tensor: Tensor, op: Any) -> Tensor:
    if world_size() == 1:
        return tensor.clone()
    # NCCL reduces GPU tensors alone.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
    reduced = tensor.detach().to(device, copy=True).contiguous()
    dist.all_reduce(reduced, op=op)
    return reduced.to(tensor.device)
