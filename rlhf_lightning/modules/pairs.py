"""A batch of pairs as one batch of rows, so that both sides go through the model in one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_lightning.batches import PreferenceBatch


class Rows(NamedTuple):
    """The chosen rows, then the rejected ones."""

    tokens: Tensor  # [2B, S] int64, right-padded
    lengths: Tensor  # [2B] int64, prompt + response
    prompt_lengths: Tensor  # [2B] int64
    response_mask: Tensor  # [2B, T] bool, the response tokens that count


def as_rows(batch: PreferenceBatch) -> Rows:
    """Chosen above rejected, the narrower side padded with 0 (any id would do: masks come from the lengths)."""
    sides = (batch.chosen, batch.rejected)
    width = max(side.tokens.shape[1] for side in sides)
    masks = [side.response_mask for side in sides]
    steps = max(mask.shape[1] for mask in masks)
    return Rows(
        tokens=torch.cat([pad(side.tokens, (0, width - side.tokens.shape[1])) for side in sides]),
        lengths=torch.cat([side.lengths for side in sides]),
        prompt_lengths=torch.cat([side.prompt_lengths for side in sides]),
        response_mask=torch.cat([pad(mask, (0, steps - mask.shape[1])) for mask in masks]),
    )


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """``sum_b weights[b] * losses[b]``; a row of weight 0 adds nothing, even where its loss is NaN."""
    return torch.where(weights > 0, losses * weights, 0.0).sum()
