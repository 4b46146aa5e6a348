"""What one PPO iteration learns from: the sampled responses with everything that is held fixed during the update.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens. The critic is asked about
``T + 1`` states: before each response token, and after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from rlhf_lightning.models.positions import response_mask


@dataclass
class Experience:
    """One iteration's experience; every number fp32 under every precision setting, every field's first axis is B."""

    tokens: Tensor  # [B, S] int64, right-padded
    lengths: Tensor  # [B] int64, prompt + response
    prompt_lengths: Tensor  # [B] int64
    weights: Tensor  # [B] float32, 0 at filler rows
    log_probs: Tensor  # [B, T] of the policy before the update
    reference_log_probs: Tensor  # [B, T]
    values: Tensor  # [B, T + 1] of the critic before the update
    value_mask: Tensor  # [B, T + 1] bool, the states that the critic is trained on
    advantages: Tensor  # [B, T], whitened where that is asked for
    returns: Tensor  # [B, T + 1]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True on the response tokens that count."""
        return response_mask(self.prompt_lengths, self.lengths) & (self.weights > 0)[:, None]

    def take(self, rows: Tensor) -> Experience:
        """The given rows, cut to the longest of them: no padding is computed that the group does not need."""
        lengths, prompt_lengths = self.lengths[rows], self.prompt_lengths[rows]
        width = int(lengths.max())
        steps = int((lengths - prompt_lengths).max())
        widths = {
            "tokens": width,
            "log_probs": steps,
            "reference_log_probs": steps,
            "values": steps + 1,
            "value_mask": steps + 1,
            "advantages": steps,
            "returns": steps + 1,
        }
        taken = {}
        for field in fields(self):
            value = getattr(self, field.name)[rows]
            taken[field.name] = value[:, : widths[field.name]] if field.name in widths else value
        return Experience(**taken)
