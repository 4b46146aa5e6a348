"""The language-model head fused with token log-probabilities and entropy: the logits are never held whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.ops import checks
from rlhf_lightning.ops.token_log_probs import reference as _token_log_probs

_NAME = "linear_token_log_probs"
_CHUNK = 1 << 24  # logits that the reference holds at a time: 64 MiB in float32


def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`token_log_probs` of ``hidden @ weight.T``, without ever holding those ``[N, V]`` logits.

    The naive equivalent::

        log_probs, entropy = token_log_probs(hidden @ weight.T, tokens, temperature)

    Args:
        hidden: ``[N, H]`` floating point, last hidden states.
        weight: ``[V, H]``, the head's weight, of the same dtype; under autocast both are cast to the autocast dtype.
        tokens: ``[N]`` int64 in ``[0, V)``.
        temperature: a positive number.

    Returns:
        ``(log_probs, entropy)``, each ``[N]`` float32 (float64 for float64 operands), in nats, both differentiable in
        ``hidden`` and ``weight`` (once). The products are computed in the operands' dtype, all the rest in float32.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value, a token outside the vocabulary (on
        the CPU; elsewhere that is a device-side assertion).
    """
    _check(hidden, weight, tokens, temperature)
    return reference(hidden, weight, tokens, temperature)


def reference(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """:func:`linear_token_log_probs` in plain PyTorch: by chunks of rows, whose logits are computed again in the backward."""
    rows = max(1, _CHUNK // weight.shape[0])
    parts = [
        checkpoint(_logits_to_log_probs, h, weight, t, temperature, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)
    ]
    log_probs, entropy = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropy)


def _logits_to_log_probs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    checks.token_range(_NAME, tokens, weight.shape[0])
    return _token_log_probs(hidden @ weight.T, tokens, temperature)


def _check(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> None:
    checks.float_tensor(_NAME, "hidden", hidden)
    checks.float_tensor(_NAME, "weight", weight)
    checks.int64_tensor(_NAME, "tokens", tokens)
    checks.dimensions(_NAME, "hidden", hidden, "[N, H]", 2)
    checks.dimensions(_NAME, "weight", weight, "[V, H]", 2)
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{_NAME}: weight must have shape [V, {hidden.shape[1]}] with V > 0, got shape {list(weight.shape)}"
        )
    checks.same_shape(_NAME, "tokens", tokens, hidden.shape[:1], "hidden without its last dimension")
    for name, tensor in (("weight", weight), ("tokens", tokens)):
        checks.same_device(_NAME, name, tensor, hidden.device, "hidden")
    if not torch.is_autocast_enabled(hidden.device.type):  # autocast makes them the same
        checks.same_dtype(_NAME, "weight", weight, hidden.dtype, "hidden")
    checks.number(_NAME, "temperature", temperature, "a positive number", 0.0, float("inf"), open_low=True)
