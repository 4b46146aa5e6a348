"""A reward made of several rewards of the same thing, lower where they disagree."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.combined import Combined

Aggregate = Literal["mean", "worst", "deviation", "variance"]


class Ensemble(Combined):
    """One score from several rewards of the same thing, ``r_1 .. r_k``, for example reward models of k seeds.

    A policy that maximises one reward model soon exploits its errors. Members that were trained separately make
    different errors, so responses on which they disagree get a lower score. Coste et al. 2023, arXiv 2310.02743:

    - ``mean``: ``m = mean_i r_i``;
    - ``worst``: ``min_i r_i``, the paper's worst-case optimisation;
    - ``variance``: ``m - coefficient * mean_i (r_i - m)^2``, the paper's uncertainty-weighted optimisation;
    - ``deviation``: ``m - coefficient * sqrt(mean_i (r_i - m)^2)``, a penalty in the unit of the rewards, so that a
      coefficient means the same for rewards of any scale.

    Logs ``reward/disagreement``, the mean deviation over responses.

    Args:
        rewards: the members, two or more.
        aggregate: which of the four.
        coefficient: the penalty's coefficient, for ``deviation`` and ``variance`` only; None takes 1.
    """

    def __init__(
        self, rewards: list[Reward], aggregate: Aggregate = "deviation", coefficient: float | None = None
    ) -> None:
        super().__init__(rewards)
        if len(rewards) < 2:
            raise InputError(f"ensemble rewards: expected two or more members, got {len(rewards)}; name more of them")
        check_choice("ensemble aggregate", aggregate, Aggregate)
        if coefficient is not None and aggregate in ("mean", "worst"):
            raise InputError(
                f"ensemble coefficient: {coefficient} has no effect on aggregate {aggregate}; leave it out, or take "
                "deviation or variance"
            )
        if coefficient is not None and not (coefficient >= 0 and math.isfinite(coefficient)):
            raise InputError(f"ensemble coefficient: expected a number from 0, got {coefficient}")
        self.aggregate = aggregate
        self.coefficient = 1.0 if coefficient is None else coefficient

    def forward(self, rollout: Rollout) -> Tensor:
        scores = self.scores(rollout)
        mean, variance = scores.mean(dim=0), scores.var(dim=0, correction=0)
        self.noted = {"disagreement": variance.sqrt()}
        if self.aggregate == "mean":
            return mean
        if self.aggregate == "worst":
            return scores.amin(dim=0)
        return mean - self.coefficient * (variance if self.aggregate == "variance" else variance.sqrt())
