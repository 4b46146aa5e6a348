"""What every decoder-only trunk has, found without knowing the architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel


def decoder_layers(trunk: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a trunk's layers: its ``ModuleList`` with the most parameters.

    The outermost one, where lists nest (a mixture's experts inside each layer).
    """
    modules = dict(trunk.named_modules())
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)}
    assert lists, f"{type(trunk).__name__} keeps its layers in no ModuleList"
    name = max(lists, key=lambda name: (sum(p.numel() for p in lists[name].parameters()), -len(name)))
    return name, lists[name]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embeddings ``[V, H]``."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass, and compute the rest again: less memory, more time.

    It takes effect in train mode alone.
    """
    options = {"use_reentrant": False}  # the reentrant kind needs inputs with gradients, and FSDP2's hooks run twice
    # Transformers has renamed the method, and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def linear_in_full_precision(states: Tensor, head: nn.Linear) -> Tensor:
    """``head(states)`` computed in float32 (float64 for float64), whatever autocast or the operands' dtype say.

    Rewards and values feed advantages, where bf16's three digits are not enough.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(states.device.type, enabled=False):
        return functional.linear(states.to(dtype), head.weight.to(dtype), bias)
