"""Pairs of responses: both sides as one batch of rows, their log-probs, and the loss and metrics of a method.

Shapes: ``B`` pairs of this process, ``T`` response tokens. A pair's two rows stand apart: row ``b`` of ``2B`` is pair
``b``'s chosen response, row ``B + b`` its rejected one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jsonargparse.typing import restricted_number_type
from torch import Tensor
from torch.nn.functional import pad

from rlhf_lightning.algorithms.losses import PreferenceLoss, negative_log_likelihood, preference_loss
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.models.policy import Policy, Reference
from rlhf_lightning.training.totals import Metrics, Totals

# Half or more would say that the labels are worthless or the wrong way round.
LabelSmoothing = restricted_number_type("LabelSmoothing", float, [(">=", 0), ("<", 0.5)])


def check_smoothing(label_smoothing: float, loss_type: str) -> None:
    """Raises an InputError if the loss is unknown, or is asked for label smoothing and has none."""
    check_choice("model.loss_type", loss_type, PreferenceLoss)
    if label_smoothing > 0 and loss_type != "sigmoid":
        raise InputError(
            f"model.label_smoothing: {label_smoothing} has no meaning for loss_type {loss_type}; set it to 0, or use "
            "sigmoid"
        )


class Rows(NamedTuple):
    """The chosen rows, then the rejected ones."""

    tokens: Tensor  # [2B, S] int64, right-padded
    lengths: Tensor  # [2B] int64, prompt + response
    prompt_lengths: Tensor  # [2B] int64
    response_mask: Tensor  # [2B, T] bool, the response tokens that count

    @property
    def response_tokens(self) -> Tensor:
        """``[2B]`` int64, tokens of the response that count; 1 where none does, so that it can be divided by."""
        return self.response_mask.sum(dim=1).clamp(min=1)


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


def wins(first: Tensor, second: Tensor) -> Tensor:
    """1 where ``first`` is larger, 0 where it is smaller, one half at a tie; ``[B]`` float32."""
    return (first > second).float() + 0.5 * (first == second).float()


def decided(batch: PreferenceBatch) -> Tensor:
    """``[B]`` bool: whether one of the two responses is preferred, so that a prediction can be right or wrong."""
    return torch.ones_like(batch.weights, dtype=torch.bool) if batch.preferences is None else batch.preferences > 0.5


def response_log_probs(model: Policy | Reference, rows: Rows) -> Tensor:
    """The responses' summed log-probs ``[2B]`` under a model, in one forward pass; the tokens that count alone."""
    log_probs = model(rows.tokens, rows.lengths, rows.prompt_lengths).log_probs
    return -negative_log_likelihood(log_probs, rows.response_mask)


class JudgedPairs(NamedTuple):
    """Pairs, and what stays fixed while the policy learns from them."""

    rows: Rows
    reference_log_probs: Tensor | None  # [2B] summed over the response; None without a reference

    def log_ratios(self, log_probs: Tensor) -> Tensor:
        """``[2B]``: the policy's summed log-probs ``[2B]`` less those of the reference."""
        assert self.reference_log_probs is not None
        return log_probs - self.reference_log_probs


class JudgedLoss(NamedTuple):
    """What a method makes of a batch of judged pairs or responses."""

    losses: Tensor  # [B], one for each weight of the batch
    metrics: Metrics  # by name: values [B], and which of them count where their row has a weight

    def add_to(self, totals: Totals, weights: Tensor, name: Callable[[str], str]) -> None:
        """Adds the loss and the metrics to ``totals``.

        Args:
            totals: where to.
            weights: ``[B]``, the rows'.
            name: from a metric's name to the one that is logged.
        """
        totals.add(name("loss"), self.losses, weights)
        for metric, (values, counted) in self.metrics.items():
            totals.add(name(metric), values, counted & (weights > 0))


def pair_loss(losses: Tensor, rewards: Tensor, log_probs: Tensor, **more: Tensor) -> JudgedLoss:
    """The losses of pairs, with accuracy and margin of their rewards, and the rewards and log-probs themselves.

    Args:
        losses: ``[B]``.
        rewards: ``[2B]``, what the method takes for the responses' rewards.
        log_probs: ``[2B]``, summed over the response, under the policy.
        more: other metrics, ``[B]`` each.
    """
    chosen, rejected = rewards.chunk(2)
    values = {"accuracy": wins(chosen, rejected), "margin": chosen - rejected, **more}
    for group, both in (("rewards", rewards), ("logps", log_probs)):
        values[f"{group}/chosen"], values[f"{group}/rejected"] = both.chunk(2)
    everything = torch.ones_like(losses, dtype=torch.bool)
    return JudgedLoss(losses, {name: (value, everything) for name, value in values.items()})


def preference_losses(
    ratios: Tensor, tokens: Tensor, beta: float, kind: PreferenceLoss, label_smoothing: float
) -> Tensor:
    """``[B]``, DPO's loss of each pair.

    Args:
        ratios: ``[2B]``, the responses' summed log-probs less those of the reference; the chosen ones first.
        tokens: ``[2B]``, the tokens of each response, which ``ipo`` divides by.
        beta: the strength of the pull to the reference.
        kind: of the loss.
        label_smoothing: the probability that a label is the wrong way round.
    """
    chosen, rejected = (ratios / tokens if kind == "ipo" else ratios).chunk(2)
    return preference_loss(chosen, rejected, beta, kind, label_smoothing)
