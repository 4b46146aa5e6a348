"""The ``fsdp2`` strategy, and when gradients are exchanged.

Lightning's DDP and PyTorch's FSDP2 both average gradients over the processes. The losses here are sums: modules
multiply by the process count, and divide by a count over all processes (`GradientStep`, `OnPolicyModule`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


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
