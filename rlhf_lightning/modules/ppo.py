"""PPO: sample, score, compute advantages with a critic's help, and a few epochs of clipped updates of both.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens. `docs/ppo.md` lists every
implementation detail with the test that holds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.algorithms.advantages import explained_variance
from rlhf_lightning.batches import DemonstrationBatch, PromptBatch
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions, ModelFactory, NetworkOptions
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.ops.clipped_value_loss import clipped_value_loss
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.actors import Actors
from rlhf_lightning.training.balancing import router_loss
from rlhf_lightning.training.credit import AdvantageOptions, CreditAssignment
from rlhf_lightning.training.critic import CriticOptions, start_critic
from rlhf_lightning.training.experience import CriticExperience
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import ClippedObjective, Loss, ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions, decay_groups
from rlhf_lightning.training.sampler import RolloutOptions
from rlhf_lightning.training.shaping import ScoreOptions


class NewScores(NamedTuple):
    """A micro-batch under the policy and the critic as they are now."""

    log_probs: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    values: Tensor  # [B, T + 1]
    imitation: Tensor | None  # scalar, the summed negative log-likelihood of the demonstrations; None without any


class PPOModule(OnPolicyModule):
    """Proximal policy optimisation of a language model against a reward, with a KL penalty towards a reference.

    Schulman et al. 2017, arXiv 1707.06347, algorithm 1; Ouyang et al. 2022, arXiv 2203.02155.

    Args:
        model: folder (or hub id) of the policy to train, usually an SFT run's.
        reward: what scores a response; ``rlhf_lightning.rewards.ModelReward``, ``FunctionReward``, ``WeightedSum``, ...
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        iterations: how often to sample; each time takes ``data.batch_size`` prompts.
        sampling: how responses are drawn.
        engine: what answers prompts; None takes this library's own decode loop, or transformers' generation where that
            cannot run the model, see docs/rollout.md.
        scores: from the reward's scores to those that are learnt from.
        kl: the KL penalty.
        critic: what estimates the value of an unfinished response.
        advantages: from token rewards and values to advantages and returns.
        objective: the policy's loss.
        ptx_coef: weight of the negative log-likelihood a token of demonstrations, which keeps the policy at what it was
            taught (PPO-ptx, Ouyang et al. 2022, equation 2). A step's demonstrations are the responses that the rows of
            its prompts have in the data (``chosen`` or ``completion``); prompts without one add none.
        update: the optimizer steps of an iteration.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the sampling, the order of minibatches, fresh heads and adapters.

    Raises:
        InputError: options contradict each other.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        reference: str | None = None,
        iterations: PositiveInt = 100,
        sampling: RolloutOptions = RolloutOptions(),
        engine: RolloutEngine | None = None,
        scores: ScoreOptions = ScoreOptions(),
        kl: KLOptions = KLOptions(),
        critic: CriticOptions = CriticOptions(),
        advantages: AdvantageOptions = AdvantageOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(),
        ptx_coef: NonNegativeFloat = 0.0,
        update: UpdateOptions = UpdateOptions(epochs=4, minibatches=4),
        optimizer: AdamWOptions = AdamWOptions(learning_rate=1e-6, eps=1e-5),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            model,
            reward=reward,
            reference=reference,
            iterations=iterations,
            sampling=sampling,
            engine=engine,
            scores=scores,
            kl=kl,
            update=update,
            optimizer=optimizer,
            lora=lora,
            network=network,
            seed=seed,
        )
        if critic.warmup >= iterations:
            raise InputError(
                f"model.critic.warmup: after {critic.warmup} iterations of the critic alone none of the {iterations} "
                "are left for the policy; raise model.iterations or lower it"
            )
        for name in ("missing_eos_penalty", "length_penalty"):
            if advantages.bootstrap_truncated and (penalty := getattr(scores, name)) > 0:
                raise InputError(
                    f"model.scores.{name}: {penalty} has no effect on a cut response with "
                    "advantages.bootstrap_truncated, which puts the critic's value in the place of its score; leave "
                    "one of the two out"
                )
        self.critic_options, self.ptx_coef = critic, ptx_coef
        self.credit = CreditAssignment(advantages)
        self.objective = ClippedObjective(objective, kl, sampling.max_new_tokens)
        if ptx_coef > 0:
            self.data_view = replace(self.data_view, demonstrations="all")

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration of algorithm 1: sample, score, estimate advantages, and update policy and critic."""
        assert self.actors is not None
        self.actors.resting = self.iteration < self.critic_options.warmup
        rollout, scores = self.sample(batch)
        with self.phases.timed("score"), torch.no_grad():
            old = self.evaluate(rollout, scores, self.objective.known(rollout))
            shaped, kl, values = self.shaping(scores, rollout), self.kl.per_token(old), old.values
            assert values is not None
            rewards, states = self.credit.token_rewards(shaped, kl, self.kl.coef, rollout, values)
            mask = rollout.response_mask & (rollout.prompts.weights > 0)[:, None]
            advantages, returns = self.credit.compute_advantages(rewards, values, states, mask)
            advantages = self.objective.apply_importance_weights(advantages, rollout, old, self.totals)
            explained = explained_variance(values, returns, states, all_reduce_sum)
            self.totals.add("critic/explained_variance", explained)
            weights, demonstrations = rollout.prompts.weights, self.demonstrations(batch)
            critic = {"values": values, "value_mask": states, "returns": returns, "demonstrations": demonstrations}
            experience = CriticExperience.of(rollout, old, advantages, weights, **critic)
        self.finish(rollout, scores, self.learn(experience))

    def loss(self, new: NewScores, experience: CriticExperience) -> Loss:
        """Equation 9: the clipped surrogate (7), the value loss, and PPO-ptx's term."""
        policy, metrics = self.objective(new, experience)
        options, states = self.critic_options, experience.value_mask
        value_loss, clipped = clipped_value_loss(new.values, experience.values, experience.returns, options.clip)
        metrics |= {"critic/loss": (value_loss, states), "critic/clipfrac": (clipped.float(), states)}
        sums = *policy, options.coef * torch.where(states, value_loss, 0.0).sum()
        return Loss(sums if new.imitation is None else (*sums, self.ptx_coef * new.imitation), metrics)

    def counts(self, experience: CriticExperience, rows: Tensor) -> Tensor:
        """What the policy's loss is divided by, states, and tokens of demonstrations."""
        counts = [self.objective.count(experience, rows), experience.value_mask[rows].sum()[None]]
        if experience.demonstrations is not None:
            counts.append(experience.demonstrations.response_weights[rows].sum()[None])
        return torch.cat(counts)

    # The critic

    @property
    def critic(self) -> ScalarModel | None:
        """The critic that is a model of its own; None before ``configure_model``, or where it is a head."""
        return None if self.actors is None else self.actors.critic

    def build_policy(self, factory: ModelFactory) -> Policy:
        """See `OnPolicyModule.build_policy`; with a critic's head on the policy's trunk if asked for."""
        return factory.policy(self.model_folder, self.critic_options.on_trunk)

    def build_actors(self, factory: ModelFactory) -> Actors:
        """See `OnPolicyModule.build_actors`; with the critic that is a model of its own."""
        actors = super().build_actors(factory)
        actors.critic = start_critic(self.critic_options, factory, actors.policy, self.model_folder, self.reward)
        return actors

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `RLHFModule.parameter_groups`; the critic's own parameters with their own learning rate."""
        assert self.actors is not None
        options, (policy, critic) = self.optimizer_options, self.actors.own_parameters()
        rate = self.critic_options.learning_rate or options.learning_rate
        groups = decay_groups(policy, options.learning_rate, options.weight_decay)
        return groups + decay_groups(critic, rate, options.weight_decay)

    def shape_options(self) -> dict[str, Any]:
        """See `RLHFModule.shape_options`; with the kind of critic."""
        return {**super().shape_options(), "critic.kind": self.critic_options.kind}

    # PPO-ptx

    def demonstrations(self, batch: PromptBatch) -> DemonstrationBatch | None:
        """Those of an iteration's prompts; None without ``ptx_coef``.

        Raises:
            InputError: they are asked for, and the batch carries none.
        """
        if self.ptx_coef > 0 and batch.demonstrations is None:
            raise InputError(
                f"model.ptx_coef: {self.ptx_coef} asks for demonstrations and the batches carry none; serve them with "
                "PreferenceDataModule, or set it to 0"
            )
        return batch.demonstrations if self.ptx_coef > 0 else None

    def new_scores(self, micro: CriticExperience) -> NewScores:
        """See `OnPolicyModule.new_scores`; with a pass over the micro-batch's demonstrations."""
        assert self.actors is not None
        log_probs, entropy, values = self.actors(*micro.inputs)
        d, imitation = micro.demonstrations, None
        if d is not None:
            with torch.set_grad_enabled(not self.actors.resting):
                policy, weights = self.actors.policy, d.response_weights
                imitation, own = policy.cross_entropy(d.tokens, d.lengths, d.prompt_lengths, weights)
                self.totals.add("policy/ptx_loss", -own, weights)
                routers = router_loss(policy, d.weights > 0, weights.sum(), self.totals, "policy/ptx_router_loss")
                imitation = imitation + routers
        return NewScores(log_probs, entropy, values, imitation)
