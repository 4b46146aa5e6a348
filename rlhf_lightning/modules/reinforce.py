"""REINFORCE++: PPO's clipped update and token-level KL penalty, without a critic.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.algorithms.advantages import discounted_returns, token_rewards
from rlhf_lightning.algorithms.masked import whiten
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import check_choice
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.policy import TokenScores
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.options import ClosedUnitInterval, NonNegativeInt, PositiveInt
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.experience import Experience
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import ClippedObjective, Loss, ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions
from rlhf_lightning.training.shaping import ScoreOptions, check_group

Baseline = Literal["none", "group_mean"]


class ReinforcePlusPlusModule(OnPolicyModule):
    """REINFORCE++: Hu 2025, arXiv 2501.03262. Advantages are whitened over the whole iteration and all processes.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        group_size: responses to each prompt.
        baseline: ``group_mean`` takes the mean score of the prompt's responses off each score first (the paper's
            REINFORCE++ with baseline); it needs a ``group_size`` of at least 2.
        gamma: discount per token.
        iterations: how often to sample; each time takes ``data.batch_size`` prompts.
        sampling: how responses are drawn.
        engine: what answers prompts; None takes this library's own decode loop, or transformers' generation where that
            cannot run the model, see docs/rollout.md.
        scores: from the reward's scores to those that are learnt from.
        kl: the KL penalty; ``coef`` is of each token.
        objective: the policy's loss.
        update: the optimizer steps of an iteration.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the sampling, the order of minibatches, and adapters.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        reference: str | None = None,
        group_size: PositiveInt = 1,
        baseline: Baseline = "none",
        gamma: ClosedUnitInterval = 1.0,
        iterations: PositiveInt = 100,
        sampling: RolloutOptions = RolloutOptions(),
        engine: RolloutEngine | None = None,
        scores: ScoreOptions = ScoreOptions(),
        kl: KLOptions = KLOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(),
        update: UpdateOptions = UpdateOptions(),
        optimizer: AdamWOptions = AdamWOptions(learning_rate=1e-6, eps=1e-5),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        check_choice("model.baseline", baseline, Baseline)
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
            group_size=group_size if baseline == "none" else check_group(group_size),
        )
        self.objective = ClippedObjective(objective, kl, sampling.max_new_tokens)
        self.baseline_kind = baseline
        self.gamma = gamma

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """A token's advantage is the discounted reward from it on, KL penalties and final score, whitened."""
        rollout, scores = self.sample(batch)
        with self.phases.timed("score"), torch.no_grad():
            old = self.evaluate(rollout, scores, self.objective.known(rollout))
            shaped = self.shaping(scores, rollout)
            if self.baseline_kind == "group_mean":
                groups = shaped.reshape(-1, self.group_size)
                shaped = (groups - groups.mean(dim=1, keepdim=True)).flatten()
            rewards, mask = token_rewards(
                scores=shaped,
                kl=self.kl.per_token(old),
                lengths=rollout.response_lengths,
                truncated=rollout.truncated,
                weights=rollout.prompts.weights,
                kl_coef=self.kl.coef,
            )
            advantages = whiten(discounted_returns(rewards, mask, self.gamma), mask, all_reduce_sum)[:, :-1]
            weights = rollout.prompts.weights
            experience = self.objective.experience(rollout, old, advantages, weights, self.totals)
        self.finish(rollout, scores, self.learn(experience))

    def counts(self, experience: Experience, rows: Tensor) -> Tensor:
        """What the policy's loss is divided by."""
        return self.objective.count(experience, rows)

    def loss(self, new: TokenScores, experience: Experience) -> Loss:
        """The clipped surrogate."""
        return self.objective(new, experience)
