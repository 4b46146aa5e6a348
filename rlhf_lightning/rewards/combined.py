"""Rewards that combine several rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards.base import Reward, check_scores


class Combined(Reward):
    """The base of combinations of rewards: prepares all parts, and asks each for its scores.

    Args:
        rewards: the parts. A response that one of them skips has no score.
    """

    def __init__(self, rewards: list[Reward]) -> None:
        super().__init__()
        if not rewards:
            raise InputError("rewards: the list is empty; name at least one reward")
        self.rewards = nn.ModuleList(rewards)
        self.may_skip = any(reward.may_skip for reward in rewards)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, mesh: Any | None = None) -> None:
        """Prepares each part."""
        for reward in self.rewards:
            assert isinstance(reward, Reward)
            reward.prepare(tokenizer, device, mesh)

    def scores(self, rollout: Rollout) -> Tensor:
        """Each reward's checked scores: ``[number of rewards, B]``, NaN where a reward has skipped a response.

        Raises: the error of the first part that failed, once all parts were asked. A part that is a sharded model waits
        for the same part on the other processes, where no part may have failed.
        """
        scores: list[Tensor] = []
        failed: Exception | None = None
        for reward in self.rewards:
            assert isinstance(reward, Reward)
            try:
                scores.append(check_scores(reward(rollout), rollout, type(reward).__name__, reward.may_skip))
            except Exception as error:  # a user's own reward may raise anything
                failed = failed or error
        if failed is not None:
            raise failed
        return torch.stack(scores)


class WeightedSum(Combined):
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
