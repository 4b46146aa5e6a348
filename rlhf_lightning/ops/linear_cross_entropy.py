"""The language-model head fused with a weighted cross-entropy whose token weights are known in advance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.ops import checks, extension
from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs
from rlhf_lightning.ops.linear_token_log_probs import reference as _linear_token_log_probs

_NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, token_weights: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted negative log-likelihood of tokens under a language-model head, as in supervised fine-tuning.

    The naive equivalent::

        log_probs, entropy = token_log_probs(hidden @ weight.T, tokens, temperature)
        loss = -(token_weights * log_probs).sum()
        return loss, log_probs.detach(), entropy.detach()

    Since the token weights are given, the forward pass computes the gradients, too, while it has the logits; the
    backward pass only scales them. On the CPU in float32 and float64 this takes three products, for 256 rows of logits
    at a time, while :func:`linear_token_log_probs` and a sum take four. Elsewhere (16 bits and more than 256 rows,
    CUDA) it takes four here, too. float16 uses that composition, because its gradients must be scaled before they are
    rounded.

    Args:
        hidden: ``[N, H]`` floating point, last hidden states.
        weight: ``[V, H]``, the head's weight, of the same dtype; under autocast both are cast to the autocast dtype.
        tokens: ``[N]`` int64 in ``[0, V)``.
        token_weights: ``[N]`` floating point, how much each token counts: 0 for padding, else 1 for a sum or 1 / count
            for a mean. They get no gradient.
        temperature: a number in ``[1e-12, 1e12]``.

    Returns:
        ``(loss, log_probs, entropy)``: the loss a scalar, differentiable in ``hidden`` and ``weight`` (once, in reverse
        mode); ``log_probs`` and ``entropy`` ``[N]`` in nats, without gradient. All float32 (float64 for float64
        operands). The products are computed in the operands' dtype, all the rest in float32.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value, a token outside the vocabulary (on
        the CPU; elsewhere that is a device-side assertion). NotImplementedError: the native operator was asked for a
        second derivative, or for one in forward mode (``torch.func.jvp``).
    """
    checks.language_model_head(_NAME, hidden, weight, tokens, temperature)
    checks.float_tensor(_NAME, "token_weights", token_weights)
    checks.same_shape(_NAME, "token_weights", token_weights, tokens.shape, "tokens")
    checks.same_device(_NAME, "token_weights", token_weights, hidden.device, "hidden")
    token_weights = token_weights.detach()
    if _operand_dtype(hidden) == torch.float16:  # its gradients must see the loss's scale before they are rounded
        return _composed(*linear_token_log_probs(hidden, weight, tokens, temperature), token_weights)
    if extension.use_native(_NAME, hidden.device):
        checks.reverse_mode(_NAME, hidden, weight)
        learning = torch.is_grad_enabled()
        hidden_needed, weight_needed = learning and hidden.requires_grad, learning and weight.requires_grad
        return torch.ops.rlhf_lightning.linear_cross_entropy(
            hidden, weight, tokens, token_weights, temperature, hidden_needed, weight_needed
        )[:3]
    return reference(hidden, weight, tokens, token_weights, temperature)


def reference(
    hidden: Tensor, weight: Tensor, tokens: Tensor, token_weights: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_cross_entropy` in plain PyTorch; gradients by autograd."""
    return _composed(*_linear_token_log_probs(hidden, weight, tokens, temperature), token_weights.detach())


def _composed(log_probs: Tensor, entropy: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = -(token_weights.to(log_probs.dtype) * log_probs).sum()
    return loss, log_probs.detach(), entropy.detach()


def _operand_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _fake(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    token_weights: Tensor,
    temperature: float,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = checks.compute_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(tokens.shape, dtype=dtype),
        hidden.new_empty(tokens.shape, dtype=dtype),
        hidden.new_empty(hidden.shape if hidden_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else outputs without gradient would get zeros of the weight's size
    ctx.save_for_backward(*output[3:])
    ctx.needed = inputs[5:]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    checks.first_order(_NAME)
    if grad_loss is None:  # the loss was not used
        return (None,) * 7
    # The gradients are scaled in place to save memory. They must be copied if the graph is retained (another backward
    # pass may need them), if the pass is traced for a compiler, or if there is a whole batch of incoming gradients.
    must_copy = torch._C._autograd._get_current_graph_task_keep_graph() or type(grad_loss) is not Tensor
    must_copy = must_copy or _is_batched(grad_loss)
    scale = Tensor.mul if must_copy else Tensor.mul_
    gradients = [scale(g, grad_loss) if n else None for g, n in zip(ctx.saved_tensors, ctx.needed, strict=True)]
    return *gradients, None, None, None, None, None


def _is_batched(x: Tensor) -> bool:
    # By torch.vmap, or by torch.autograd.grad's is_grads_batched, which has a vmap of its own.
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::linear_cross_entropy", _fake)
    torch.library.register_autograd("rlhf_lightning::linear_cross_entropy", _backward, setup_context=_setup_context)
