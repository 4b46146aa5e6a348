"""The two clipped losses as their tests call them."""

from __future__ import annotations

import torch
from ops.support import randn

from rlhf_lightning.ops.clipped_policy_loss import clipped_policy_loss
from rlhf_lightning.ops.clipped_policy_loss import reference as policy_reference
from rlhf_lightning.ops.clipped_value_loss import clipped_value_loss
from rlhf_lightning.ops.clipped_value_loss import reference as value_reference

# Each with its options; the clips bind for a part of what `case` draws.
BOTH = [(clipped_policy_loss, (0.2, 0.2, 1.5)), (clipped_value_loss, (0.2,))]
EVERY = [*BOTH, (policy_reference, (0.2, 0.2, 1.5)), (value_reference, (0.2,))]


def run(function, tensors, *options):
    first = tensors[0].detach().requires_grad_()
    loss, clipped = function(first, *tensors[1:], *options)
    (grad,) = torch.autograd.grad(loss.sum(), first)
    return loss.detach(), clipped, grad


def case(*shape, dtype=torch.float32, spread=0.4, seed=0):
    first = randn(*shape, dtype=torch.float64, seed=seed)
    second = first + spread * randn(*shape, dtype=torch.float64, seed=seed + 1)
    return first.to(dtype), second.to(dtype), randn(*shape, dtype=dtype, seed=seed + 2)
