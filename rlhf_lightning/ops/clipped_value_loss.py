"""PPO's clipped value loss, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.ops import checks, extension

_NAME = "clipped_value_loss"


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic per token, the larger one of the free and the clipped prediction.

    With ``v``, ``v_old``, ``R`` the arguments (Schulman et al. 2016, arXiv 1506.02438, fit the value function within a
    trust region; the clipped form is that of PPO's first implementation: Huang et al. 2022, "The 37 Implementation
    Details of Proximal Policy Optimization", detail 9)::

        loss = 0.5 * max((v - R)**2, (v_old + clamp(v - v_old, -clip, clip) - R)**2)

    Args:
        values: any shape, floating point, of the trained critic; the only argument that gets a gradient.
        old_values: same shape, the critic's values at the rollout; its dtype may differ.
        returns: same shape, the regression targets; its dtype may differ.
        clip: a positive number, how far a value may move from ``old_values``; None: no clipping.

    Returns:
        ``(loss, clipped)``, both of the arguments' shape. ``loss`` is float32 (float64 if an input is); ``clipped`` is
        bool: the value had moved further than ``clip`` and the clipped branch, with gradient 0, was strictly chosen.
        The result is bitwise the same however the elements are split over calls.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
    """
    _check(values, old_values, returns, clip)
    if extension.use_native(_NAME, values.device):
        return torch.ops.rlhf_lightning.clipped_value_loss(values, old_values, returns, clip)[:2]
    return reference(values, old_values, returns, clip)


def reference(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """:func:`clipped_value_loss` in plain PyTorch; gradients by autograd."""
    dtype = checks.compute_dtype(values, old_values, returns)
    values, old_values, returns = values.to(dtype), old_values.detach().to(dtype), returns.detach().to(dtype)
    error = values - returns
    loss = 0.5 * (error * error)
    if clip is None:
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    change = (values - old_values).detach()
    bounded_error = (old_values + change.clamp(-clip, clip)) - returns
    bounded_loss = 0.5 * (bounded_error * bounded_error)
    # Within the clip range both branches are the same prediction, and v_old + (v - v_old) must not win by rounding.
    clipped = (change.abs() > clip) & (bounded_loss > loss)
    return torch.where(clipped, bounded_loss, loss), clipped


def _check(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> None:
    checks.float_tensor(_NAME, "values", values)
    checks.float_tensor(_NAME, "old_values", old_values)
    checks.float_tensor(_NAME, "returns", returns)
    checks.alike(_NAME, {"old_values": old_values, "returns": returns}, values, "values")
    if clip is not None:
        checks.number(_NAME, "clip", clip, "None or a positive number", 0.0, float("inf"), open_low=True)


def _fake(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor, Tensor]:
    loss = values.new_empty(values.shape, dtype=checks.compute_dtype(values, old_values, returns))
    return loss, torch.empty_like(loss, dtype=torch.bool), torch.empty_like(loss)


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::clipped_value_loss", _fake)
