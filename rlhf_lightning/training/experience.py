"""What one iteration learns from: the sampled responses, with everything that stays fixed during the update.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, Rollout
from rlhf_lightning.models.positions import response_mask

_Own = TypeVar("_Own", bound="Learnable")
_R = TypeVar("_R", bound="Sampled")
_E = TypeVar("_E", bound="Experience")


class ResponseScores(NamedTuple):
    """The scores of a rollout before the update, all float32 (float64 under ``64-true``)."""

    log_probs: Tensor  # [B, T] of the policy
    reference_log_probs: Tensor  # [B, T]
    values: Tensor | None  # [B, T + 1] of a critic: before each response token, and after the last; None without one


class Learnable(Protocol):
    """What an update asks of an experience: rows of this process that can be taken in micro-batches."""

    weights: Tensor  # [B] float32; rows of weight 0 are in no minibatch

    @property
    def sizes(self) -> Tensor:
        """[B] int64, the tokens that a row puts into a forward pass."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, lengths and prompt lengths of a forward pass over the rows."""

    def take(self: _Own, rows: Tensor) -> _Own:
        """The given rows."""

    def uncounted(self: _Own) -> _Own:
        """The same rows, none of which counts in any loss or metric."""


@dataclass
class Sampled:
    """Prompts with the responses to learn from; every field's first axis is B."""

    tokens: Tensor  # [B, S] int64, right-padded
    lengths: Tensor  # [B] int64, prompt + response
    prompt_lengths: Tensor  # [B] int64
    weights: Tensor  # [B] float32, 0 at rows that are not learnt from

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

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Learnable.inputs`: ``[B, S]``, ``[B]``, ``[B]``."""
        return self.tokens, self.lengths, self.prompt_lengths

    def take(self: _R, rows: Tensor) -> _R:
        """The given rows, cut to the longest of them: no padding is computed that the group does not need."""
        steps = self.lengths - self.prompt_lengths
        cut = int(steps[rows].max()) - int(steps.max())
        taken: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                taken[field.name] = None if value is None else value.take(rows)
                continue
            if field.name == "tokens":
                value = value[:, : int(self.lengths[rows].max())]
            elif value.dim() == 2:  # T wide, or T + 1
                value = value[:, : value.shape[1] + cut]
            taken[field.name] = value[rows]
        return type(self)(**taken)

    def uncounted(self: _R) -> _R:
        """The same rows, none of which counts in any loss or metric."""
        return replace(self, weights=torch.zeros_like(self.weights))


@dataclass
class Experience(Sampled):
    """Also has the parts of a policy gradient, float32 under every precision setting but ``64-true``."""

    log_probs: Tensor  # [B, T] of the policy before the update
    reference_log_probs: Tensor  # [B, T]
    advantages: Tensor  # [B, T], whitened where that is asked for

    @classmethod
    def of(
        cls: type[_E], rollout: Rollout, old: ResponseScores, advantages: Tensor, weights: Tensor, **more: Any
    ) -> _E:
        """The rollout with its old log-probs and advantages ``[B, T]``; rows of weight 0 are not learnt from."""
        return cls(
            tokens=rollout.tokens,
            lengths=rollout.lengths,
            prompt_lengths=rollout.prompt_lengths,
            weights=weights,
            log_probs=old.log_probs,
            reference_log_probs=old.reference_log_probs,
            advantages=advantages,
            **more,
        )


@dataclass
class CriticExperience(Experience):
    """Also has what a critic learns from: ``T + 1`` states, before each response token and after the last one."""

    values: Tensor  # [B, T + 1] of the critic before the update
    value_mask: Tensor  # [B, T + 1] bool, the states that the critic is trained on
    returns: Tensor  # [B, T + 1]
    demonstrations: DemonstrationBatch | None = None  # B rows, to the same prompts; a row of weight 0 has none

    @property
    def sizes(self) -> Tensor:
        """See `Experience.sizes`: a row's demonstration goes with it."""
        return self.lengths if self.demonstrations is None else self.lengths + self.demonstrations.lengths

    def uncounted(self) -> CriticExperience:
        """See `Experience.uncounted`."""
        demonstrations = self.demonstrations
        if demonstrations is not None:
            demonstrations = replace(demonstrations, weights=torch.zeros_like(demonstrations.weights))
        value_mask = torch.zeros_like(self.value_mask)
        return replace(super().uncounted(), value_mask=value_mask, demonstrations=demonstrations)


@dataclass
class Pairs:
    """Two responses to each of B prompts, the first preferred to the second."""

    tokens: Tensor  # [B, 2, S] int64, right-padded
    lengths: Tensor  # [B, 2] int64, prompt + response
    prompt_lengths: Tensor  # [B, 2] int64
    weights: Tensor  # [B] float32, 0 at pairs that are not learnt from
    reference_log_probs: Tensor  # [B, 2], of the whole responses

    @property
    def sizes(self) -> Tensor:
        """[B] int64, the tokens that a pair puts into a forward pass, padding of the shorter one included."""
        return 2 * self.lengths.amax(dim=1)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Learnable.inputs`: pair b is rows 2 b and 2 b + 1 of ``[2B, S]``, ``[2B]``, ``[2B]``."""
        return self.tokens.flatten(0, 1), self.lengths.flatten(), self.prompt_lengths.flatten()

    def take(self, rows: Tensor) -> Pairs:
        """The given pairs, cut to the longest response of them."""
        taken = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        taken["tokens"] = taken["tokens"][:, :, : int(taken["lengths"].max())]
        return Pairs(**taken)

    def uncounted(self) -> Pairs:
        """The same pairs, none of which counts."""
        return replace(self, weights=torch.zeros_like(self.weights))
