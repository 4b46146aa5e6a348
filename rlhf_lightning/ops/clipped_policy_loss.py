"""PPO's clipped surrogate loss, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.ops import checks, extension

_NAME = "clipped_policy_loss"
_LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: far beyond any clip range, far below an overflow


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, equation 7), negated, per token.

    With ``A`` the advantages and ``r = exp(clamp(log_probs - old_log_probs, -20, 20))``::

        loss = max(-A * r, -A * clip(r, 1 - clip_low, 1 + clip_high))
        loss = min(loss, -dual_clip * A)  where A < 0, if dual_clip is given

    The last line is Ye et al. 2020, arXiv 1912.09729, equation 5.

    Args:
        log_probs: any shape, floating point, under the trained policy; the only argument that gets a gradient.
        old_log_probs: same shape, under the policy of the rollout; its dtype may differ.
        advantages: same shape; its dtype may differ.
        clip_low: how far below 1 a lower ratio still lowers the loss, in [0, 1].
        clip_high: how far above 1 a higher ratio still lowers the loss, at least 0.
        dual_clip: bound on the loss of negative advantages, in units of ``-A``; above 1. None: no bound.

    The loss is per token, because only the caller knows which tokens count and how many the whole batch has.

    Returns:
        ``(loss, clipped)``, both of the arguments' shape. ``loss`` is float32 (float64 if an input is); its gradient is
        0 where the clipped branch or the dual bound was strictly chosen, and where the log-ratio is beyond 20.
        ``clipped`` is bool: the clipped branch was strictly chosen (the dual bound does not count).
        The result is bitwise the same however the elements are split over calls.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
    """
    _check(log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip)
    if extension.use_native(_NAME, log_probs.device):
        return torch.ops.rlhf_lightning.clipped_policy_loss(
            log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip
        )[:2]
    return reference(log_probs, old_log_probs, advantages, clip_low, clip_high, dual_clip)


def reference(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`clipped_policy_loss` in plain PyTorch; gradients by autograd."""
    dtype = checks.compute_dtype(log_probs, old_log_probs, advantages)
    negated = -advantages.detach().to(dtype)
    log_ratio = log_probs.to(dtype) - old_log_probs.detach().to(dtype)
    ratio = log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    surrogate = negated * ratio
    bounded = negated * ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    # Not torch.maximum: on ties, which are the whole range inside the clip, it would give each side half the gradient.
    clipped = bounded > surrogate
    loss = torch.where(clipped, bounded, surrogate)
    if dual_clip is not None:
        bound = dual_clip * negated
        loss = torch.where((negated > 0) & (loss > bound), bound, loss)
    return loss, clipped


def _check(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> None:
    checks.float_tensor(_NAME, "log_probs", log_probs)
    checks.float_tensor(_NAME, "old_log_probs", old_log_probs)
    checks.float_tensor(_NAME, "advantages", advantages)
    checks.alike(_NAME, {"old_log_probs": old_log_probs, "advantages": advantages}, log_probs, "log_probs")
    checks.number(_NAME, "clip_low", clip_low, "a number in [0, 1]", 0.0, 1.0, open_low=False)
    checks.number(_NAME, "clip_high", clip_high, "a number of at least 0", 0.0, float("inf"), open_low=False)
    if dual_clip is not None:
        checks.number(_NAME, "dual_clip", dual_clip, "None or a number above 1", 1.0, float("inf"), open_low=True)


def _fake(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = log_probs.new_empty(log_probs.shape, dtype=checks.compute_dtype(log_probs, old_log_probs, advantages))
    return loss, torch.empty_like(loss, dtype=torch.bool), torch.empty_like(loss)


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::clipped_policy_loss", _fake)
