"""The clipped surrogate, with its KL and entropy terms, as a pure function of new scores and experience.

Shapes: ``B`` rows of this process, ``T`` response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_lightning.algorithms.importance import truncated_importance_weights
from rlhf_lightning.algorithms.kl import Estimator, kl_estimate
from rlhf_lightning.algorithms.losses import LossNormalisation, TokenShares, token_shares
from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.ops.clipped_policy_loss import clipped_policy_loss
from rlhf_lightning.options import NonNegativeFloat, OpenUnitInterval, Options, PositiveFloat
from rlhf_lightning.training.experience import Experience, ResponseScores
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.totals import Metrics, Totals


class PolicyScores(Protocol):
    """The new scores that the surrogate needs."""

    @property
    def log_probs(self) -> Tensor:
        """``[B, T]``."""

    @property
    def entropy(self) -> Tensor:
        """``[B, T]``."""


class Loss(NamedTuple):
    """A micro-batch's loss."""

    sums: tuple[Tensor, ...]  # scalars; each is divided by the count of its own kind in the whole minibatch
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Options):
    """The policy's loss.

    Args:
        clip_low: the ratio is clipped from below at ``1 - clip_low``.
        clip_high: and from above at ``1 + clip_high``; larger than ``clip_low`` it is DAPO's clip-higher.
        dual_clip: bounds the loss of negative advantages at ``-dual_clip * A``; above 1, None for no bound.
        entropy_coef: weight of an entropy bonus.
        normalisation: the mean over a minibatch's tokens (``token``); over its responses, of the mean over their
            tokens (``sequence``) or of the sum divided by ``sampling.max_new_tokens`` (``constant``).
        old_log_probs: ``recompute`` them by a training pass, so that the first ratio is 1; or take the ``rollout``'s,
            which spares the pass and leaves ``rollout/logprob_gap`` unknown.
        importance_cap: multiply a token's advantage by how much likelier the policy finds it than the rollout's engine
            did, at most by this: corrects for an engine that computes other probabilities, or has older weights. None
            takes the rollout as the policy's own.

    Raises:
        InputError: options contradict each other.
    """

    clip_low: OpenUnitInterval = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: PositiveFloat | None = None
    entropy_coef: NonNegativeFloat = 0.0
    normalisation: LossNormalisation = "token"
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    importance_cap: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise InputError(
                f"model.objective.dual_clip: expected a number above 1, got {self.dual_clip}; null turns it off"
            )
        if self.importance_cap is not None and self.old_log_probs == "rollout":
            raise InputError(
                f"model.objective.importance_cap: {self.importance_cap} has no effect with old_log_probs: rollout, "
                "whose ratios are to the rollout's probabilities already; leave one of the two out"
            )


class ClippedObjective:
    """Raises the probability of tokens with a positive advantage: Schulman et al. 2017, arXiv 1707.06347, equation 7.

    Args:
        options: the surrogate's.
        kl: of which the term in the loss is read.
        max_new_tokens: what ``normalisation: constant`` divides by.
        kl_estimator: of the term in the loss where ``kl`` names none.
    """

    def __init__(
        self, options: ObjectiveOptions, kl: KLOptions, max_new_tokens: int, kl_estimator: Estimator = "k2"
    ) -> None:
        check_choice("kl_estimator", kl_estimator, Estimator)
        self.options = options
        self.kl_coef = kl.loss_coef
        self.kl_estimator = kl.loss_estimator or kl_estimator
        self.max_new_tokens = max_new_tokens

    def known(self, rollout: Rollout) -> Tensor | None:
        """The rollout's log-probs ``[B, T]`` where ratios are taken to them; None where a pass computes them."""
        return rollout.log_probs if self.options.old_log_probs == "rollout" else None

    def apply_importance_weights(
        self, advantages: Tensor, rollout: Rollout, old: ResponseScores, totals: Totals
    ) -> Tensor:
        """The advantages ``[B, T]`` times their tokens' importance weights, which is right since the loss is linear.

        Adds the mean weight and the share of capped weights to ``totals``.
        """
        cap = self.options.importance_cap
        if cap is None:
            return advantages
        weights = truncated_importance_weights(old.log_probs, rollout.log_probs, cap)
        mask = rollout.response_mask & (rollout.prompts.weights > 0)[:, None]
        totals.add("importance/weight", weights, mask)
        totals.add("importance/capped", weights >= cap, mask)
        return advantages * weights

    def experience(
        self, rollout: Rollout, old: ResponseScores, advantages: Tensor, weights: Tensor, totals: Totals
    ) -> Experience:
        """What an update learns from.

        Args:
            rollout: the responses.
            old: their scores before the update.
            advantages: ``[B, T]``.
            weights: ``[B]``; rows of weight 0 are not learnt from.
            totals: where importance weights are counted.
        """
        advantages = self.apply_importance_weights(advantages, rollout, old, totals)
        return Experience.of(rollout, old, advantages, weights)

    def shares(self, mask: Tensor) -> TokenShares:
        """How much each of ``[B, T]`` tokens counts."""
        return token_shares(mask, self.options.normalisation, self.max_new_tokens)

    def count(self, experience: Any, rows: Tensor) -> Tensor:
        """``[1]``: what the given rows add to what the loss is divided by, tokens or responses."""
        return self.shares(experience.mask[rows]).total[None]

    def __call__(self, new: PolicyScores, e: Experience) -> Loss:
        """The loss of ``[B, T]`` tokens, summed over a micro-batch; each token counts by `shares`."""
        mask, log_probs, entropy = e.mask, new.log_probs, new.entropy
        options = self.options
        loss, clipped = clipped_policy_loss(
            log_probs, e.log_probs, e.advantages, options.clip_low, options.clip_high, options.dual_clip
        )
        kl = kl_estimate(log_probs, e.reference_log_probs, self.kl_estimator)
        token_loss = loss + self.kl_coef * kl - options.entropy_coef * entropy
        change = log_probs.detach() - e.log_probs
        metrics: Metrics = {
            "policy/loss": (token_loss, mask),
            "policy/approx_kl": (0.5 * change.square(), mask),
            "policy/clipfrac": (clipped.float(), mask),
            "policy/entropy": (entropy, mask),
            "policy/ratio": (change.exp(), mask),
            "policy/ratio_squared": ((2 * change).exp(), mask),
        }
        return Loss(((torch.where(mask, token_loss, 0.0) * self.shares(mask).weights).sum(),), metrics)
