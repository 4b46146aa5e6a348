"""Decoder layers compiled by torch.compile, in training and in scoring: fewer and larger kernels a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rlhf_lightning.models.layers import decoder_layers
from rlhf_lightning.models.packing import attention_is_compiled_around
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel

# A layer is compiled once for each mode: trained or frozen, with gradients or without, packed or padded. After 8 modes
# torch would stop compiling and run the layer as it is.
_VARIANTS = 64


def compile_layers(module: Policy | ScalarModel) -> None:
    """Compiles each decoder layer at its first call, for any number of rows and tokens.

    Layers are alike, so one compilation serves them all. FSDP2 gathers each layer before it runs, so the model is not
    compiled as a whole.
    """
    from torch._dynamo import config  # takes a second, and only who compiles needs it

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    attention_is_compiled_around()
    for layer in decoder_layers(module.model.base_model)[1]:
        layer.compile(dynamic=True)


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Runs the layers uncompiled: sampling calls them with a cache, and each change of it would compile them again."""
    compiled = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call
