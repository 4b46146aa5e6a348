"""Parts that every decoder-only trunk has, found without knowing the architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# How much two computations of the same numbers may differ by rounding, as a fraction of the largest number.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def nearly_equal(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to the same numbers, computed in ``dtype``, differ by no more than rounding."""
    return bool((ours - theirs).abs().max() <= _ROUNDING[dtype] * theirs.abs().max())


def computed_in(model: nn.Module) -> torch.dtype:
    """The least precise dtype that a model computes in; float64 models have parts that compute in float32.

    TF32, which float32 products on a GPU may be in, has the digits of float16.
    """
    parameter = next(model.parameters())
    device = parameter.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = torch.float32 if parameter.dtype == torch.float64 else parameter.dtype
    rounded = device == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.float16 if rounded else dtype


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


@contextmanager
def attention_of(trunk: nn.Module, name: str) -> Iterator[None]:
    """Lets the trunk's layers call another attention function."""
    # Layers look it up in a config, which in a copied part of a model is their own.
    found = (vars(part).get("config") for part in trunk.modules())
    configs: list[Any] = list({id(config): config for config in found if config is not None}.values())
    own = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, before in zip(configs, own, strict=True):
            config._attn_implementation = before


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps only the layers' inputs for the backward pass, and computes the rest again: less memory, more time.

    It takes effect in train mode alone.
    """
    contexts = partial(_recomputed_as_before, model.base_model)
    # Not the reentrant kind: it needs inputs with gradients, and FSDP2's hooks run twice.
    options = {"use_reentrant": False, "context_fn": contexts}
    # Transformers has renamed the method, and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _recomputed_as_before(trunk: nn.Module) -> Any:
    """Contexts for a checkpointed layer's forward and for its second run, in the backward pass: the same attention."""
    config: Any = trunk.config
    return nullcontext(), attention_of(trunk, config._attn_implementation)


def linear_in_full_precision(states: Tensor, head: nn.Linear) -> Tensor:
    """``head(states)`` computed in float32 (float64 for float64), whatever autocast or the operands' dtype say.

    Rewards and values feed advantages, where bf16's three digits are not enough.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(states.device.type, enabled=False):
        return functional.linear(states.to(dtype), head.weight.to(dtype), bias)
