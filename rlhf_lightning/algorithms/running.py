"""Mean and variance of everything counted so far, over a whole training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from rlhf_lightning.algorithms.masked import Reduce, masked_mean, masked_variance


@dataclass
class RunningMoments:
    """Count, mean and biased variance of all numbers ever given to `update`, in float64.

    Two sets are joined as in Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", which stays exact where the mean is far from 0.
    """

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> None:
        """Count ``x`` where ``mask`` is True; with ``reduce`` (see `masked_mean`) those of all processes."""
        counted = mask.sum().double()
        added = float(counted if reduce is None else reduce(counted))
        if added == 0:
            return
        mean = float(masked_mean(x.double(), mask, reduce))
        variance = float(masked_variance(x.double(), mask, reduce))
        total, apart = self.count + added, mean - self.mean
        squares = self.count * self.variance + added * variance + apart * apart * self.count * added / total
        self.count, self.mean, self.variance = total, self.mean + apart * added / total, squares / total

    def normalise(self, x: Tensor) -> Tensor:
        """``(x - mean) / sqrt(variance + 1e-8)``, in x's dtype."""
        return ((x.double() - self.mean) / math.sqrt(self.variance + 1e-8)).to(x.dtype)

    def state(self) -> dict[str, float]:
        """What `RunningMoments(**state)` restores exactly."""
        return asdict(self)
