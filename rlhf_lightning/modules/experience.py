"""What one iteration learns from: the sampled responses with everything that is held fixed during the update.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_lightning.models.positions import response_mask

_E = TypeVar("_E", bound="Experience")


@dataclass
class Experience:
    """One iteration's experience; every number fp32 (fp64 under ``64-true``), every field's first axis is B."""

    tokens: Tensor  # [B, S] int64, right-padded
    lengths: Tensor  # [B] int64, prompt + response
    prompt_lengths: Tensor  # [B] int64
    weights: Tensor  # [B] float32, 0 at filler rows
    log_probs: Tensor  # [B, T] of the policy before the update
    reference_log_probs: Tensor  # [B, T]
    advantages: Tensor  # [B, T], whitened where that is asked for

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True on the response tokens that count."""
        return response_mask(self.prompt_lengths, self.lengths) & (self.weights > 0)[:, None]

    @property
    def sizes(self) -> Tensor:
        """[B] int64, the tokens that a row puts into a forward pass."""
        return self.lengths

    def take(self: _E, rows: Tensor) -> _E:
        """The given rows, cut to the longest of them: no padding is computed that the group does not need."""
        cut = int((self.lengths - self.prompt_lengths)[rows].max()) - self.log_probs.shape[1]
        taken = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "tokens":
                value = value[:, : int(self.lengths[rows].max())]
            elif value.dim() == 2:  # T wide, or T + 1
                value = value[:, : value.shape[1] + cut]
            taken[field.name] = value[rows]
        return type(self)(**taken)

    def uncounted(self: _E) -> _E:
        """The same rows, none of which counts in any loss or metric."""
        return replace(self, weights=torch.zeros_like(self.weights))


@dataclass
class CriticExperience(Experience):
    """With what a critic learns from: ``T + 1`` states, before each response token and after the last one."""

    values: Tensor  # [B, T + 1] of the critic before the update
    value_mask: Tensor  # [B, T + 1] bool, the states that the critic is trained on
    returns: Tensor  # [B, T + 1]

    def uncounted(self) -> CriticExperience:
        """See `Experience.uncounted`."""
        return replace(super().uncounted(), value_mask=torch.zeros_like(self.value_mask))
