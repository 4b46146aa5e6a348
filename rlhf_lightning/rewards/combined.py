"""Rewards made of several rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards.base import Reward, check_scores


class _Combined(Reward):
    def __init__(self, rewards: list[Reward]) -> None:
        super().__init__()
        if not rewards:
            raise InputError("rewards: the list is empty; name at least one reward")
        self.rewards = nn.ModuleList(rewards)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, mesh: Any | None = None) -> None:
        for reward in self.rewards:
            assert isinstance(reward, Reward)
            reward.prepare(tokenizer, device, mesh)

    def scores(self, rollout: Rollout) -> Tensor:
        """Each reward's checked scores: ``[number of rewards, B]``."""
        return torch.stack([check_scores(reward(rollout), rollout, type(reward).__name__) for reward in self.rewards])


class WeightedSum(_Combined):
    """``sum_i weights[i] * rewards[i]``.

    Args:
        rewards: the parts.
        weights: one number a part; a negative one makes it a penalty.
    """

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        super().__init__(rewards)
        if len(weights) != len(rewards):
            raise InputError(f"weights: expected one for each of {len(rewards)} rewards, got {len(weights)}")
        self.weights = weights

    def forward(self, rollout: Rollout) -> Tensor:
        scores = self.scores(rollout)
        return torch.tensor(self.weights, dtype=scores.dtype, device=scores.device) @ scores


class Ensemble(_Combined):
    """``mean_i - penalty * std_i`` over the rewards: what they disagree about is worth less.

    Args:
        rewards: the members, for example reward models trained from different seeds.
        penalty: how many (biased) standard deviations are taken off; 0 is the plain mean.

    Coste et al. 2024, arXiv 2310.02743 (uncertainty-weighted optimisation, there with the variance).
    """

    def __init__(self, rewards: list[Reward], penalty: float = 0.0) -> None:
        super().__init__(rewards)
        self.penalty = penalty

    def forward(self, rollout: Rollout) -> Tensor:
        scores = self.scores(rollout)
        return scores.mean(dim=0) - self.penalty * scores.std(dim=0, correction=0)
