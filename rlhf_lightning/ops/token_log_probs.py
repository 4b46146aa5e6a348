"""Log-probabilities of tokens, and the entropy of the distributions they come from, in one read of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.ops import checks, extension

_NAME = "token_log_probs"


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy, under ``softmax(logits / temperature)``, in nats.

    The naive equivalent::

        log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
        log_probs = log_p.gather(-1, tokens[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)  # p log p = 0 where p = 0

    Args:
        logits: ``[..., V]`` floating point; -inf marks an impossible token.
        tokens: ``[...]`` int64 in ``[0, V)``. There is no ignore index: give padding any valid id and mask the result.
        temperature: a number in ``[1e-12, 1e12]``.

    Returns:
        ``(log_probs, entropy)``, each ``[...]`` float32 (float64 for float64 logits), both differentiable in ``logits``
        (once, in reverse mode). The log-probability of an impossible token is -inf; a row whose largest logit is not
        finite gives NaN.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value, a token outside the vocabulary (on
        the CPU; elsewhere that is a device-side assertion). NotImplementedError: the native operator was asked for a
        second derivative, or for one in forward mode (``torch.func.jvp``).
    """
    _check(logits, tokens, temperature)
    if extension.use_native(_NAME, logits.device):
        checks.reverse_mode(_NAME, logits)
        return torch.ops.rlhf_lightning.token_log_probs(logits, tokens, temperature)[:2]
    return reference(logits, tokens, temperature)


def reference(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """:func:`token_log_probs` in plain PyTorch; gradients by autograd."""
    checks.token_range(_NAME, tokens, logits.shape[-1])
    log_p = torch.log_softmax(logits.to(checks.compute_dtype(logits)) / temperature, dim=-1)
    log_probs = log_p.gather(-1, tokens[..., None])[..., 0]
    # With 0 in place of log 0, the product is its limit 0, and the gradient is 0 and not 0 * inf.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return log_probs, entropy


def _check(logits: Tensor, tokens: Tensor, temperature: float) -> None:
    checks.float_tensor(_NAME, "logits", logits)
    checks.int64_tensor(_NAME, "tokens", tokens)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{_NAME}: logits must have shape [..., V] with V > 0, got shape {list(logits.shape)}")
    checks.same_shape(_NAME, "tokens", tokens, logits.shape[:-1], "logits without its last dimension")
    checks.same_device(_NAME, "tokens", tokens, logits.device, "logits")
    checks.temperature_range(_NAME, temperature)


def _fake(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def result() -> Tensor:
        return logits.new_empty(tokens.shape, dtype=checks.compute_dtype(logits))

    return result(), result(), result(), result()


def _fake_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    tokens: Tensor,
    entropy: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    temperature: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, ctx.temperature = inputs
    _, entropy, shift, log_sum = output
    ctx.mark_non_differentiable(shift, log_sum)
    ctx.save_for_backward(logits, tokens, entropy, shift, log_sum)


def _backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    checks.first_order(_NAME)
    grad = torch.ops.rlhf_lightning.token_log_probs_backward(
        grad_log_probs, grad_entropy, *ctx.saved_tensors, ctx.temperature
    )
    return grad, None, None


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::token_log_probs", _fake)
    torch.library.register_fake("rlhf_lightning::token_log_probs_backward", _fake_backward)
    torch.library.register_autograd("rlhf_lightning::token_log_probs", _backward, setup_context=_setup_context)
