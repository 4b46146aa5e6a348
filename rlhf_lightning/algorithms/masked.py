"""Means, variances and whitening over the counted entries of a padded tensor, on one process or over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a tensor over all processes; the identity if there is only one.
Reduce = Callable[[Tensor], Tensor]


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is True: ``x[mask].mean()``, or 0 if no entry is counted.

    Args:
        x: any shape, float. Entries where the mask is False are ignored, even NaN.
        mask: the same shape, bool.
        reduce: sums a tensor over all processes; the mean is then over the entries of all processes.

    Returns: a scalar of x's dtype.
    """
    total, count = _sums(x, mask, reduce, power=1)
    return (total / count.clamp(min=1)).to(x.dtype)


def masked_variance(x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Biased variance (divided by the count) of ``x`` where ``mask`` is True, or 0 if no entry is counted; a scalar."""
    mean, count = _sums(x, mask, reduce, power=1)
    mean = mean / count.clamp(min=1)
    squares, count = _sums(x.double() - mean, mask, reduce, power=2)
    return (squares / count.clamp(min=1)).to(x.dtype)


def whiten(x: Tensor, mask: Tensor, reduce: Reduce | None = None, keep_mean: bool = False) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` over the counted entries, 0 elsewhere.

    Args:
        x: ``[B, T]`` float.
        mask: ``[B, T]`` bool.
        reduce: as in `masked_mean`; mean and variance are then those of all processes, so the result does not depend on
            how rows are split over them.
        keep_mean: add the mean back, for reward whitening, where a constant shift would change the value of ending
            early.

    The variance is biased (divided by the count), as in the code behind Stiennon et al. 2020, arXiv 2009.01325. Sums
    are float64. With a single entry, or constant entries, the result is 0 (or the mean), not NaN.
    """
    mean = masked_mean(x.double(), mask, reduce)
    variance = masked_variance(x.double(), mask, reduce)
    whitened = (x.double() - mean) * torch.rsqrt(variance + 1e-8) + (mean if keep_mean else 0.0)
    return torch.where(mask, whitened, 0.0).to(x.dtype)


def _sums(x: Tensor, mask: Tensor, reduce: Reduce | None, power: int) -> tuple[Tensor, Tensor]:
    # torch.where, not multiplication: NaN * 0 is NaN, and padding may hold anything.
    values = torch.where(mask, x.double(), 0.0)
    sums = torch.stack([values.pow(power).sum(), mask.sum().double()])
    total, count = (reduce(sums) if reduce is not None else sums).unbind()
    return total, count
