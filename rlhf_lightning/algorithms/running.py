"""Running mean and variance of numbers over a whole training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from rlhf_lightning.algorithms.masked import Reduce, masked_mean, masked_variance


@dataclass
class RunningMoments:
    """Count, mean and biased variance of all numbers that `update` has got, in float64.

    Two sets are combined as in Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", which stays exact even if the mean is far from 0.
    """

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> None:
        """Adds ``x`` where ``mask`` is True; with ``reduce`` (see `masked_mean`) the numbers of all processes."""
        entries = mask.sum().double()
        added = float(entries if reduce is None else reduce(entries))
        if added == 0:
            return
        mean = float(masked_mean(x.double(), mask, reduce))
        variance = float(masked_variance(x.double(), mask, reduce))
        total, shift = self.count + added, mean - self.mean
        squares = self.count * self.variance + added * variance + shift * shift * self.count * added / total
        self.count, self.mean, self.variance = total, self.mean + shift * added / total, squares / total

    def normalise(self, x: Tensor) -> Tensor:
        """``(x - mean) / sqrt(variance + 1e-8)``, in x's dtype."""
        return ((x.double() - self.mean) / math.sqrt(self.variance + 1e-8)).to(x.dtype)

    def state(self) -> dict[str, float]:
        """The state, from which `RunningMoments(**state)` restores this object exactly."""
        return asdict(self)
