"""The language-model head fused with token log-probabilities and entropy, without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.ops import checks, extension
from rlhf_lightning.ops.token_log_probs import reference as _token_log_probs

_NAME = "linear_token_log_probs"
_CHUNK = 1 << 24  # logits that the reference holds at a time: 64 MiB in float32


def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`token_log_probs` of ``hidden @ weight.T``, without ever holding all of the ``[N, V]`` logits.

    The naive equivalent::

        log_probs, entropy = token_log_probs(hidden @ weight.T, tokens, temperature)

    Args:
        hidden: ``[N, H]`` floating point, last hidden states.
        weight: ``[V, H]``, the head's weight, of the same dtype; under autocast both are cast to the autocast dtype.
        tokens: ``[N]`` int64 in ``[0, V)``.
        temperature: a number in ``[1e-12, 1e12]``.

    Returns:
        ``(log_probs, entropy)``, each ``[N]`` float32 (float64 for float64 operands), in nats, both differentiable in
        ``hidden`` and ``weight`` (once, in reverse mode). Products are in the operands' dtype, the rest in float32.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value, a token outside the vocabulary (on
        the CPU; elsewhere that is a device-side assertion). NotImplementedError: the native operator was asked for a
        second derivative, or for one in forward mode (``torch.func.jvp``).
    """
    checks.language_model_head(_NAME, hidden, weight, tokens, temperature)
    if extension.use_native(_NAME, hidden.device):
        checks.reverse_mode(_NAME, hidden, weight)
        return torch.ops.rlhf_lightning.linear_token_log_probs(hidden, weight, tokens, temperature)[:2]
    return reference(hidden, weight, tokens, temperature)


def reference(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """:func:`linear_token_log_probs` in plain PyTorch, in chunks of rows. The backward pass computes logits again."""
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


def _fake(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def result() -> Tensor:
        return hidden.new_empty(tokens.shape, dtype=checks.compute_dtype(hidden))

    return result(), result(), result(), result()


def _fake_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    entropy: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    temperature: float,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if hidden_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, tokens, ctx.temperature = inputs
    _, entropy, shift, log_sum = output
    ctx.mark_non_differentiable(shift, log_sum)
    ctx.save_for_backward(hidden, weight, tokens, entropy, shift, log_sum)


def _backward(
    ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, *_: Any
) -> tuple[Tensor | None, Tensor | None, None, None]:
    checks.first_order(_NAME)
    hidden_needed, weight_needed = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = torch.ops.rlhf_lightning.linear_token_log_probs_backward(
        grad_log_probs, grad_entropy, *ctx.saved_tensors, ctx.temperature, hidden_needed, weight_needed
    )
    return grad_hidden if hidden_needed else None, grad_weight if weight_needed else None, None, None


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::linear_token_log_probs", _fake)
    torch.library.register_fake("rlhf_lightning::linear_token_log_probs_backward", _fake_backward)
    torch.library.register_autograd("rlhf_lightning::linear_token_log_probs", _backward, setup_context=_setup_context)
