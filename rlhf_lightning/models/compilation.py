"""Decoder layers made by torch.compile: a layer's many small kernels become few, in training and scoring alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rlhf_lightning.models.layers import decoder_layers
from rlhf_lightning.models.packing import attention_is_compiled_around
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import trunks

# Trained and frozen, with gradients and without, packed and padded: each is compiled once for all models and layers.
# torch gives up after 8, and runs what comes then as it is.
_VARIANTS = 64


def compile_layers(module: Policy | ScalarModel) -> None:
    """Have each decoder layer compiled at its first call, for any number of rows and tokens.

    Layer by layer and not the whole model: layers are alike, so one compilation serves them all, and FSDP2 gathers each
    before it runs.
    """
    from torch._dynamo import config  # takes a second, and only who compiles needs it

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    attention_is_compiled_around()
    for trunk in trunks(module):
        for layer in decoder_layers(trunk)[1]:
            layer.compile(dynamic=True)


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run the layers as they are: sampling calls them with a cache, whose every change would be another compilation."""
    compiled = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call
