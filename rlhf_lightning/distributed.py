"""The ``fsdp2`` strategy, its checkpoints, which cannot run code, and a switch for the exchange of gradients.

Lightning's DDP and PyTorch's FSDP2 both average gradients over the processes. The losses here are sums, so modules
multiply by the number of processes, and divide by a count over all processes (`GradientStep`, `OnPolicyModule`).
"""

from __future__ import annotations

import io
import pickle
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from rlhf_lightning.errors import InputError

# All that the metadata of a sharded checkpoint is made of.
_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}

TIMEOUT = timedelta(minutes=5)  # how long a process waits for one that does not answer, unless the user says otherwise


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all processes (PyTorch's ``fully_shard``).

    It is Lightning's ``ModelParallelStrategy`` with all processes data-parallel. The module shards itself in
    ``configure_model``. It runs on CPUs (over gloo) and on GPUs.

    Args:
        save_distributed_checkpoint: write a folder with one file for each process's shards, instead of one file.
        process_group_backend: backend of torch.distributed; None takes nccl on GPUs and gloo on CPUs.
        timeout: how long a collective may wait for the other processes.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = TIMEOUT,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Sets the size of the mesh. The constructor does not know the numbers of nodes and devices yet."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a file or a folder of shards.

        Raises:
            InputError: the folder's metadata could run code when it is read, or is damaged; or the file is of a run
                without this strategy.
        """
        path = Path(checkpoint_path)
        if path.is_dir() and (said := strange_metadata(path)):
            raise InputError(f"--ckpt_path {path}: {said}; take another checkpoint, from a source you trust")
        if path.is_file() and _numbers_parameters(path):
            raise InputError(
                f"--ckpt_path {path}: it was saved without trainer.strategy fsdp2, and its optimizer's state fits only "
                "such a run; go on without the strategy, or begin a new run with the trained model"
            )
        try:
            with _data_only():
                return super().load_checkpoint(checkpoint_path, weights_only)
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, pickle.UnpicklingError):
                    raise InputError(
                        f"--ckpt_path {checkpoint_path}: a shard holds more than data; take another checkpoint, from a "
                        "source you trust"
                    ) from error
            raise


@contextmanager
def ending_together(trainer: Trainer, own_timeout: bool) -> Iterator[None]:
    """If the body fails, ends the processes that this one has started: they may stand still. Not before 5 seconds.

    Args:
        trainer: whose strategy waits for the other processes.
        own_timeout: whether the user has given the strategy; else DDP's, 30 minutes, becomes `TIMEOUT`.
    """
    if isinstance(trainer.strategy, DDPStrategy) and not own_timeout:
        trainer.strategy._timeout = TIMEOUT
    try:
        yield
    except BaseException:
        deadline = time.monotonic() + 5.0
        children = getattr(trainer.strategy.launcher, "procs", [])
        ending = list(children)
        children.clear()  # Lightning watches this list, and kills this process, too, before it can say what was wrong
        for process in ending:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        raise


def leave_group() -> None:
    """Ends the process group, if there is one: its threads may still run when Python ends, and abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Sharded training with PyTorch's FSDP2")


def strange_metadata(checkpoint: Path) -> str:
    """What in a sharded checkpoint's metadata is none of torch's own classes; empty if nothing is.

    torch reads this file by `pickle`, which can run any code. Here nothing else is looked up than the known classes.
    """
    try:
        with (checkpoint / ".metadata").open("rb") as file:
            _MetadataReader(file).load()
    except OSError as error:
        return f".metadata cannot be read ({error.strerror})"
    except Exception as error:  # a damaged pickle can raise anything
        return f".metadata is none that torch has written ({' '.join(str(error).split())[:120]})"
    return ""


def _numbers_parameters(file: Path) -> bool:
    """Whether a file's optimizer state numbers the parameters, as it does without fsdp2, and does not name them.

    Lightning would number the module's parameters in another order than the optimizer's groups, and mix up the state.
    """
    optimizers = torch.load(file, mmap=True, map_location="cpu", weights_only=True)["optimizer_states"]
    return any(isinstance(name, int) for state in optimizers for name in state["state"])


@contextmanager
def _data_only() -> Iterator[None]:
    """Shards are read without code. torch reads what is no tensor in them by a pickle that may run any."""
    original = DefaultLoadPlanner.load_bytes

    def load_bytes(planner: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises an UnpicklingError where there is more than data
        value.seek(0)
        original(planner, read_item, value)

    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DefaultLoadPlanner.load_bytes = original  # type: ignore[method-assign]


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _METADATA.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def gradient_sync(module: LightningModule, on: bool) -> Iterator[None]:
    """Sets whether ``backward`` inside reduces gradients over the processes. Only the last micro-batch needs it on.

    If it is off, DDP and FSDP2 add up local gradients, and the next backward pass with it on reduces them once. It is
    for manual optimisation; under automatic optimisation Lightning does this.
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
