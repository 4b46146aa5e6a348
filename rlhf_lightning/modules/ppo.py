"""PPO: sample, score, compute advantages with a critic's help, and a few epochs of clipped updates of both.

Shapes: ``B`` prompts of this process, ``S`` prompt + response tokens, ``T`` response tokens. The iteration itself is
`OnPolicyModule.training_step`. `docs/ppo.md` lists every implementation detail with the test that holds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.advantages import (
    ScorePosition,
    explained_variance,
    length_adaptive_advantages,
    token_rewards,
)
from rlhf_lightning.algorithms.kl import kl_estimate
from rlhf_lightning.algorithms.masked import whiten
from rlhf_lightning.batches import DemonstrationBatch, Rollout
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.actor_critic import ActorCriticModule, values_at_the_cut
from rlhf_lightning.modules.balancing import router_loss
from rlhf_lightning.modules.experience import CriticExperience
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.ops.clipped_value_loss import clipped_value_loss
from rlhf_lightning.ops.gae import gae
from rlhf_lightning.rewards.base import Reward


class PPOModule(ActorCriticModule):
    """Proximal policy optimisation of a language model against a reward, with a KL penalty towards a reference.

    Schulman et al. 2017, arXiv 1707.06347, algorithm 1; Ouyang et al. 2022, arXiv 2203.02155.

    Args:
        model: folder (or hub id) of the policy to train, usually an SFT run's.
        reward: what scores a response; ``rlhf_lightning.rewards.ModelReward``, ``FunctionReward``, ``WeightedSum``, ...
        epochs: passes over an iteration's responses.
        minibatches: optimizer steps in a pass.
        gamma: discount per token.
        lam: GAE's lambda; None takes 0.95.
        critic_lam: lambda of the returns that the critic learns, 1 for what really came (decoupled GAE, Yue et al.
            2025, arXiv 2504.05118); None takes ``lam``.
        lam_alpha: in place of ``lam`` for the policy, a lambda of ``1 - 1 / (lam_alpha * l)`` for a response of l
            tokens (length-adaptive GAE, the same paper); None for none.
        clip_value: how far a value may move from its old one before its loss is clipped; None for no clipping.
        value_coef: weight of the value loss.
        ptx_coef: weight of the negative log-likelihood a token of demonstrations, which keeps the policy at what it was
            taught (PPO-ptx, Ouyang et al. 2022, equation 2). A step's demonstrations are the responses that the rows of
            its prompts have in the data (``chosen`` or ``completion``); prompts without one add none.
        whiten_advantages: give an iteration's advantages mean 0 and variance 1, over all processes.
        whiten_rewards: scale an iteration's token rewards to variance 1 and keep their mean.
        score_position: ``last_token``, or ``after_eos`` for one slot later.
        bootstrap_truncated: a response without EOS earns, in place of its score, the critic's value of the state it was
            cut off in: what is still to come is in the value already, the score with it.
        kwargs: critic, the policy's loss, the loop, models, sampling, optimizer: see `ActorCriticModule`.

    Raises: InputError when options contradict each other.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        epochs: PositiveInt = 4,
        minibatches: PositiveInt = 4,
        gamma: ClosedUnitInterval = 1.0,
        lam: ClosedUnitInterval | None = None,
        critic_lam: ClosedUnitInterval | None = None,
        lam_alpha: PositiveFloat | None = None,
        clip_value: PositiveFloat | None = 0.2,
        value_coef: NonNegativeFloat = 0.1,
        ptx_coef: NonNegativeFloat = 0.0,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        score_position: ScorePosition = "last_token",
        bootstrap_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, epochs=epochs, minibatches=minibatches, **kwargs)
        if lam is not None and critic_lam is not None and lam_alpha is not None:
            raise InputError(
                f"model.lam: {lam} has no effect beside critic_lam and lam_alpha, which say all; leave one of them out"
            )
        self.gamma, self.lam = gamma, 0.95 if lam is None else lam
        self.critic_lam, self.lam_alpha = critic_lam, lam_alpha
        self.clip_value, self.value_coef, self.ptx_coef = clip_value, value_coef, ptx_coef
        if ptx_coef > 0:
            self.data_view = replace(self.data_view, demonstrations="all")
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        for penalty in ("missing_eos_penalty", "length_penalty"):
            if bootstrap_truncated and getattr(self.shaped, penalty) > 0:
                raise InputError(
                    f"model.{penalty}: {getattr(self.shaped, penalty)} has no effect on a cut response with "
                    "bootstrap_truncated, which puts the critic's value in the place of its score; leave one of the "
                    "two out"
                )
        self.score_position, self.bootstrap_truncated = score_position, bootstrap_truncated

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> CriticExperience:
        """What stays fixed during the update: old log-probs, values, token rewards, advantages, returns."""
        demonstrations = rollout.prompts.demonstrations if self.ptx_coef > 0 else None
        if self.ptx_coef > 0 and demonstrations is None:
            raise InputError(
                f"model.ptx_coef: {self.ptx_coef} asks for demonstrations and the batches carry none; serve them with "
                "PreferenceDataModule, or set it to 0"
            )
        now = self.assess(rollout)
        assert now.values is not None
        mask = rollout.response_mask & (rollout.prompts.weights > 0)[:, None]
        shaped = self.shaped(scores, rollout)
        if self.bootstrap_truncated:
            shaped = shaped.masked_fill(rollout.truncated, 0.0)
        rewards, value_mask = token_rewards(
            scores=shaped,
            kl=kl_estimate(now.log_probs, now.reference_log_probs, self.kl_estimator),
            lengths=rollout.response_lengths,
            truncated=rollout.truncated,
            weights=rollout.prompts.weights,
            kl_coef=self.kl_coefficient,
            score_position=self.score_position,
        )
        if self.whiten_rewards:
            rewards = whiten(rewards, value_mask, all_reduce_sum, keep_mean=True)
        if self.bootstrap_truncated:
            rewards = rewards + self.gamma * values_at_the_cut(rollout, now.values)
        advantages, returns = self.credit(rewards, now.values, value_mask)
        advantages = advantages[:, :-1]  # the slot after the last token is a state, with no action to credit
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, all_reduce_sum)
        advantages = self.corrected(advantages, rollout, now, totals)
        count_rollout(totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        totals.add("val/explained_variance", explained_variance(now.values, returns, value_mask, all_reduce_sum))
        return CriticExperience(
            tokens=rollout.tokens,
            lengths=rollout.lengths,
            prompt_lengths=rollout.prompt_lengths,
            weights=rollout.prompts.weights,
            log_probs=now.log_probs,
            reference_log_probs=now.reference_log_probs,
            advantages=advantages,
            values=now.values,
            value_mask=value_mask,
            returns=returns,
            demonstrations=demonstrations,
        )

    def credit(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages for the policy and returns for the critic, each with its own lambda; all ``[B, T + 1]``."""
        advantages, returns = gae(rewards, values, mask, self.gamma, self.lam)
        if self.critic_lam is not None:
            returns = gae(rewards, values, mask, self.gamma, self.critic_lam)[1]
        if self.lam_alpha is not None:
            advantages = length_adaptive_advantages(rewards, values, mask, self.gamma, self.lam_alpha)
        return advantages, returns

    def losses(self, e: CriticExperience, totals: Totals, moved: Totals) -> tuple[Tensor, Tensor]:
        """Sums over a micro-batch: of the policy's loss over its tokens, and of the critic's over its states."""
        log_probs, entropy, values = self.token_scores(e.tokens, e.lengths, e.prompt_lengths, self.temperature)
        assert values is not None
        policy_loss = self.surrogate(log_probs, entropy, e, totals, moved)
        value_loss, clipped = clipped_value_loss(values, e.values, e.returns, self.clip_value)
        totals.add("val/clipfrac", clipped.float(), e.value_mask)
        totals.add("loss/value", value_loss, e.value_mask)
        return policy_loss, torch.where(e.value_mask, value_loss, 0.0).sum()

    def imitation(self, demonstrations: DemonstrationBatch, totals: Totals) -> Tensor:
        """The negative log-likelihood of a micro-batch's demonstrations, summed over their tokens; a scalar."""
        assert self.policy is not None
        d, weights = demonstrations, demonstrations.response_weights
        loss, log_probs = self.policy.cross_entropy(d.tokens, d.lengths, d.prompt_lengths, weights)
        totals.add("loss/ptx", -log_probs, weights)
        return loss + router_loss(self.policy, d.weights > 0, weights.sum(), totals, "loss/ptx_router")

    def counts(self, experience: CriticExperience, rows: Tensor) -> Tensor:
        """What the policy's loss is divided by, states, and tokens of demonstrations."""
        counts = [super().counts(experience, rows), experience.value_mask[rows].sum()[None]]
        if experience.demonstrations is not None:
            counts.append(experience.demonstrations.response_weights[rows].sum()[None])
        return torch.cat(counts)

    def loss(self, micro: CriticExperience, counts: Tensor, totals: Totals, moved: Totals) -> Tensor:
        """The policy's loss, ``value_coef`` times the critic's, and ``ptx_coef`` times that of the demonstrations."""
        policy_loss, value_loss = self.losses(micro, totals, moved)
        loss = policy_loss / counts[0] + self.value_coef * value_loss / counts[1]
        if micro.demonstrations is not None:
            with torch.set_grad_enabled(not self.warming_up):
                imitation = self.imitation(micro.demonstrations, totals)
            loss = loss + self.ptx_coef * imitation / counts[2]
        return loss + self.no_loss() if self.warming_up else loss
