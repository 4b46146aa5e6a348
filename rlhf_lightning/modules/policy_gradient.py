"""What the policy-gradient methods share: the KL penalty and its controller, and the clipped surrogate.

Shapes: ``B`` rows of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveFloat
from torch import Tensor

from rlhf_lightning.algorithms.importance import truncated_importance_weights
from rlhf_lightning.algorithms.kl import Estimator, adapt_kl_coefficient, kl_estimate
from rlhf_lightning.algorithms.losses import LossNormalisation, TokenShares, token_shares
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.experience import Experience
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.modules.sampling import ResponseScores
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.ops.clipped_policy_loss import clipped_policy_loss
from rlhf_lightning.rewards.base import Reward


class PolicyGradientModule(OnPolicyModule):
    """Raises the probability of tokens with a positive advantage; the method that derives from it says which have.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        kl_coef: penalty per nat in the reward; the starting value where ``kl_target`` is set.
        kl_estimator: k1, k2 or k3, of the penalty in the reward.
        kl_target: nats per response that the coefficient is adapted to hold; None keeps it fixed.
        kl_horizon: responses over which the adaptive coefficient corrects its error; None takes 10000.
        kl_loss_coef: weight of a KL term in the loss, beside or instead of the one in the reward.
        kl_loss_estimator: k2 or k3; k1 is no choice, since its gradient is zero in expectation. None takes k2.
        kl_stop: leave out the rest of an iteration's updates once a minibatch's approximate KL to the policy that
            sampled passes this many nats per token; None never does.
        clip_low: the ratio is clipped from below at ``1 - clip_low``.
        clip_high: and from above at ``1 + clip_high``; larger than ``clip_low`` it is DAPO's clip-higher.
        dual_clip: bounds the loss of negative advantages at ``-dual_clip * A``; above 1, None for no bound.
        entropy_coef: weight of an entropy bonus.
        loss_normalisation: of the policy's loss: the mean over a minibatch's tokens (``token``); over its responses, of
            the mean over their tokens (``sequence``) or of the sum divided by ``max_new_tokens`` (``constant``).
        old_log_probs: ``recompute`` them by a training pass, so that the first ratio is 1; or take the ``rollout``'s,
            which spares the pass and leaves ``rollout/logprob_gap`` unknown.
        importance_cap: multiply a token's advantage by how much likelier the policy finds it than the rollout's engine
            did, at most by this: corrects for an engine that computes other probabilities, or has older weights. None
            takes the rollout as the policy's own.
        kwargs: the loop, models, sampling, optimizer: see `OnPolicyModule`.

    Raises: InputError when options contradict each other.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        kl_coef: NonNegativeFloat = 0.05,
        kl_estimator: Estimator = "k1",
        kl_target: PositiveFloat | None = None,
        kl_horizon: PositiveFloat | None = None,
        kl_loss_coef: NonNegativeFloat = 0.0,
        kl_loss_estimator: Literal["k2", "k3"] | None = None,
        kl_stop: PositiveFloat | None = None,
        clip_low: OpenUnitInterval = 0.2,
        clip_high: PositiveFloat = 0.2,
        dual_clip: PositiveFloat | None = None,
        entropy_coef: NonNegativeFloat = 0.0,
        loss_normalisation: LossNormalisation = "token",
        old_log_probs: Literal["recompute", "rollout"] = "recompute",
        importance_cap: PositiveFloat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        if dual_clip is not None and dual_clip <= 1.0:
            raise InputError(f"model.dual_clip: expected a number above 1, got {dual_clip}; null turns it off")
        if kl_target is not None and kl_coef == 0:
            raise InputError(
                "model.kl_target: adapts kl_coef by factors, which leave 0 at 0; set a kl_coef to start from"
            )
        if kl_horizon is not None and kl_target is None:
            raise InputError(f"model.kl_horizon: {kl_horizon} has no effect without kl_target; set both, or none")
        if kl_loss_estimator is not None and kl_loss_coef == 0:
            raise InputError(
                f"model.kl_loss_estimator: {kl_loss_estimator} has no effect without a weight; set kl_loss_coef, or "
                "leave it out"
            )
        if importance_cap is not None and old_log_probs == "rollout":
            raise InputError(
                f"model.importance_cap: {importance_cap} has no effect with old_log_probs: rollout, whose ratios "
                "are to the rollout's probabilities already; leave one of the two out"
            )
        self.kl_coef, self.kl_estimator = kl_coef, kl_estimator
        self.kl_target, self.kl_horizon = kl_target, kl_horizon or 10000.0
        self.kl_loss_coef, self.kl_stop = kl_loss_coef, kl_stop
        self.kl_loss_estimator: Estimator = kl_loss_estimator or "k2"
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.entropy_coef, self.loss_normalisation = entropy_coef, loss_normalisation
        self.old_log_probs, self.importance_cap = old_log_probs, importance_cap
        self.kl_coefficient = kl_coef

    @property
    def warming_up(self) -> bool:
        """Whether the policy rests, for a critic to learn alone."""
        return False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"]["kl_coefficient"] = self.kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.kl_target is not None:
            self.kl_coefficient = checkpoint["on_policy"]["kl_coefficient"]

    def assess(self, rollout: Rollout) -> ResponseScores:
        """See `evaluate`; its log-probs are the ones that the ratios are taken to."""
        return self.evaluate(rollout, known=rollout.log_probs if self.old_log_probs == "rollout" else None)

    def response_rewards(self, scores: Tensor, rollout: Rollout, now: ResponseScores) -> Tensor:
        """The shaped scores less the KL penalty of the whole response, ``[B]``: the response as a single action."""
        kl = kl_estimate(now.log_probs, now.reference_log_probs, self.kl_estimator)
        return self.shaped(scores, rollout) - self.kl_coefficient * kl.masked_fill(~rollout.response_mask, 0.0).sum(1)

    def corrected(self, advantages: Tensor, rollout: Rollout, now: ResponseScores, totals: Totals) -> Tensor:
        """The advantages ``[B, T]`` times the importance weights of their tokens; the loss is linear in them.

        Logs the mean of the weights and the share that the cap has cut.
        """
        if self.importance_cap is None:
            return advantages
        weights = truncated_importance_weights(now.log_probs, rollout.log_probs, self.importance_cap)
        mask = rollout.response_mask & (rollout.prompts.weights > 0)[:, None]
        totals.add("importance/weight", weights, mask)
        totals.add("importance/capped", weights >= self.importance_cap, mask)
        return advantages * weights

    def experience(
        self, rollout: Rollout, now: ResponseScores, advantages: Tensor, weights: Tensor, totals: Totals
    ) -> Experience:
        """The rollout with `corrected` advantages ``[B, T]``; rows of weight 0 are not learnt from."""
        return Experience(
            tokens=rollout.tokens,
            lengths=rollout.lengths,
            prompt_lengths=rollout.prompt_lengths,
            weights=weights,
            log_probs=now.log_probs,
            reference_log_probs=now.reference_log_probs,
            advantages=self.corrected(advantages, rollout, now, totals),
        )

    def surrogate(self, log_probs: Tensor, entropy: Tensor, e: Experience, totals: Totals, moved: Totals) -> Tensor:
        """The clipped surrogate of ``[B, T]`` tokens, with KL and entropy terms, summed over a micro-batch.

        Each token counts by `token_shares`; `counts` has what the sum is to be divided by. Schulman et al. 2017, arXiv
        1707.06347, equation 7.
        """
        mask = e.mask
        loss, clipped = clipped_policy_loss(
            log_probs, e.log_probs, e.advantages, self.clip_low, self.clip_high, self.dual_clip
        )
        kl = kl_estimate(log_probs, e.reference_log_probs, self.kl_loss_estimator)
        token_loss = loss + self.kl_loss_coef * kl - self.entropy_coef * entropy

        change = log_probs.detach() - e.log_probs
        moved.add("approxkl", 0.5 * change.square(), mask)
        totals.add("policy/approxkl", 0.5 * change.square(), mask)
        totals.add("policy/clipfrac", clipped.float(), mask)
        totals.add("policy/entropy", entropy, mask)
        totals.add("val/ratio", change.exp(), mask)
        totals.add("val/ratio_squared", (2 * change).exp(), mask)
        totals.add("loss/policy", token_loss, mask)
        return (torch.where(mask, token_loss, 0.0) * self.shares(mask).weights).sum()

    def shares(self, mask: Tensor) -> TokenShares:
        """How much each of ``[B, T]`` tokens counts in the policy's loss."""
        return token_shares(mask, self.loss_normalisation, self.max_new_tokens)

    def counts(self, experience: Any, rows: Tensor) -> Tensor:
        """What the policy's loss is divided by: tokens or responses."""
        return self.shares(experience.mask[rows]).total[None]

    def loss(self, micro: Any, counts: Tensor, totals: Totals, moved: Totals) -> Tensor:
        """The surrogate, normalised."""
        now = self.token_scores(micro.tokens, micro.lengths, micro.prompt_lengths, self.temperature)
        return self.surrogate(now.log_probs, now.entropy, micro, totals, moved) / counts[0]

    def too_far(self, moved: Totals) -> bool:
        """Whether the approximate KL to the policy that sampled has passed ``kl_stop``."""
        return self.kl_stop is not None and moved.means()["approxkl"] > self.kl_stop

    def finish(self, rollout: Rollout, scores: Tensor, totals: Totals, steps: int) -> dict[str, float]:
        """Log the iteration, count it as done, and adapt the KL coefficient; not to a policy that rests."""
        resting = self.warming_up  # asked before the iteration counts as done
        metrics = super().finish(rollout, scores, totals, steps)
        episodes = int(all_reduce_sum((rollout.prompts.weights > 0).sum()))
        if self.kl_target is not None and episodes > 0 and not resting:
            self.kl_coefficient = adapt_kl_coefficient(
                self.kl_coefficient, metrics["objective/kl"], self.kl_target, self.kl_horizon, episodes
            )
        return metrics
