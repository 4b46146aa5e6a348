"""A simulated annotator, who prefers the better answer with a known probability.

Shapes: ``B`` prompts, ``K`` candidates for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.randomness import ANNOTATION, uniform


class SimulatedAnnotator:
    """Ranks candidates by their true quality plus noise, and sometimes at random.

    With probability ``lapse`` a ranking is random. Otherwise it is drawn from the Plackett-Luce model with utilities
    ``quality / temperature`` (Plackett 1975, "The Analysis of Permutations"), by sorting ``quality / temperature`` plus
    standard Gumbel noise (Yellott 1977). Pairs of such rankings follow the Bradley-Terry model, as reward models
    assume. So a candidate of quality ``a`` is ranked above one of quality ``b`` with probability

        (1 - lapse) * sigmoid((a - b) / temperature) + lapse / 2

    and the best accuracy that any model can reach on such labels is known exactly (`label_ceiling`).

    Args:
        temperature: the difference in quality that is noticed with log-odds of 1; above 0.
        lapse: share of random rankings, in [0, 1).
        seed: seed of the noise; the noise of a ranking depends only on it and on the prompt's row number.
    """

    def __init__(self, temperature: float, lapse: float, seed: int) -> None:
        if not temperature > 0:
            raise InputError(f"annotator temperature: expected a number above 0, got {temperature}")
        if not 0 <= lapse < 1:
            raise InputError(f"annotator lapse: expected a share in [0, 1), got {lapse}")
        self.temperature = temperature
        self.lapse = lapse
        self.seed = seed

    def rank(self, quality: Tensor, rows: Tensor) -> Tensor:
        """Ranks ``[B, K]`` int64, 1 for the best, without ties.

        Args:
            quality: ``[B, K]``, the true quality of each candidate; higher is better.
            rows: ``[B]`` int64, the prompts' row numbers.
        """
        candidates = torch.arange(quality.shape[1])
        draws = uniform(self.seed, ANNOTATION, rows[:, None], candidates)
        gumbel = -torch.log(-torch.log(draws))
        looked = uniform(self.seed, ANNOTATION, rows, -1) >= self.lapse
        utility = torch.where(looked[:, None], quality.double() / self.temperature, 0.0)
        best_first = torch.argsort(utility + gumbel, dim=1, descending=True)
        return torch.argsort(best_first, dim=1) + 1

    def preference(self, first: Tensor, second: Tensor) -> Tensor:
        """The probability that a candidate of quality ``first`` is ranked above one of quality ``second``; float64."""
        seen = torch.sigmoid((first.double() - second.double()) / self.temperature)
        return (1 - self.lapse) * seen + self.lapse / 2

    def label_ceiling(self, quality: Sequence[tuple[float, float]]) -> float:
        """The expected accuracy, on this annotator's labels, of a model that knows the true quality.

        It is the mean over pairs of ``max(p, 1 - p)`` with p from `preference`. No model can do better, since nobody
        can know which labels the noise has flipped.

        Args:
            quality: the true qualities of the two candidates of each pair; at least one pair.
        """
        pairs = torch.tensor(quality, dtype=torch.float64).reshape(-1, 2)
        if len(pairs) == 0:
            raise ValueError("label_ceiling: no pairs")
        p = self.preference(pairs[:, 0], pairs[:, 1])
        return float(torch.maximum(p, 1 - p).mean())
