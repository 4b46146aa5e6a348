"""Selects the best of several responses to each prompt, and bounds the KL between this best-of-n and the policy.

Shapes: ``B`` rows are ``B / group_size`` prompts with ``group_size`` responses each. The rows of a prompt are adjacent
(`PromptBatch.repeat`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lightning.batches import PromptBatch, Rollout


def best_rows(scores: Tensor, group_size: int, keep: int = 1) -> Tensor:
    """The row numbers of each group's highest scores: ``[B]`` -> ``[B / group_size, keep]`` int64, the best first.

    Among equal scores the earlier row comes first, on any device.
    """
    groups = scores.reshape(-1, group_size)
    places = torch.argsort(groups, dim=1, descending=True, stable=True)[:, :keep]
    return torch.arange(len(groups), device=scores.device)[:, None] * group_size + places


def best_responses(rollout: Rollout, scores: Tensor, prompts: PromptBatch) -> Rollout:
    """The highest-scored response to each prompt.

    Args:
        rollout: responses to ``prompts.repeat(n)``, for any n.
        scores: one score for each response.
        prompts: the prompts without repetition; the result has their row numbers.
    """
    best = best_rows(scores, len(rollout) // len(prompts))[:, 0]
    return replace(rollout.take(best), prompts=prompts)


def best_of_kl(count: int) -> float:
    """``log n - (n - 1) / n``, an upper bound on KL(best-of-n || policy), in nats.

    The formula is from Stiennon et al. 2020, arXiv 2009.01325, appendix G.3. Beirami et al. 2024, arXiv 2401.01879,
    show that it is an upper bound, and tight if no two responses are likely to be the same.
    """
    return math.log(count) - (count - 1) / count
