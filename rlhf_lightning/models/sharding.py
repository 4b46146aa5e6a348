"""Models over several processes: FSDP2 (``fully_shard``), one group a decoder layer, the rest in the root's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlhf_lightning.collectives import rank
from rlhf_lightning.models.layers import decoder_layers
from rlhf_lightning.models.lora import merged
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel

_Model = TypeVar("_Model", Policy, ScalarModel)


def shard(module: _Model, mesh: DeviceMesh) -> _Model:
    """Shards ``module``'s parameters over ``mesh``, in place: every process holds 1 / world of each.

    Layers are gathered when they run and freed after; what is left (embeddings, LM head, final norm, critic head) stays
    gathered from forward to backward: the log-prob operator reads the LM head's weight inside the root's forward.

    Args:
        module: holds the same weights on every process, on the mesh's kind of device or on the CPU.
        mesh: one dimension, or replicas by shards.
    """
    for layer in decoder_layers(module.model.base_model)[1]:
        fully_shard(layer, reshard_after_forward=True, mesh=mesh)
    fully_shard(module, reshard_after_forward=False, mesh=mesh)
    if isinstance(module, Policy):
        for name in ("decode", "cross_entropy", "generate"):
            register_fsdp_forward_method(module, name)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Keeps all parameters of ``module`` gathered, so that a decode loop gathers once and not once a token.

    Every process enters and leaves together. Does nothing to a module that is not sharded.
    """
    groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group is not module, recurse=False)
            group.reshard()


def gathered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and whole tensor, one after the other, so that never more than one is held besides.

    An adapter is added to the weights beside it, whose names are those without one. A collective where the module is
    sharded: every process goes through all of them.
    """
    parameters = ((name, parameter.detach()) for name, parameter in module.named_parameters())
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in parameters)
    yield from merged(whole, module)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with whole tensors on the CPU, on process 0; the other processes get ``{}``.

    A collective: every process calls it. Tied weights stay one tensor under two names. On an unsharded CPU module the
    tensors are the module's own; on a GPU, or sharded, they are copies.
    """
    first = rank() == 0
    named = module.state_dict(keep_vars=True)  # keep_vars: tied parameters are then the same object
    whole: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if id(tensor) not in whole:
            gathered = tensor.detach()
            gathered = gathered.full_tensor() if isinstance(gathered, DTensor) else gathered
            whole[id(tensor)] = gathered.cpu() if first else gathered.new_empty(0)
        if first:
            state[name] = whole[id(tensor)]
    return state
