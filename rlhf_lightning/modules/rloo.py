"""RLOO: REINFORCE on whole responses, with the mean reward of the prompt's other responses as the baseline.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.algorithms.advantages import leave_one_out_advantages
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.policy import TokenScores
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.options import NonNegativeInt, PositiveInt
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.experience import Experience
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import ClippedObjective, Loss, ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions
from rlhf_lightning.training.shaping import ScoreOptions, check_group


class RLOOModule(OnPolicyModule):
    """REINFORCE leave-one-out: Ahmadian et al. 2024, arXiv 2402.14740.

    With one optimizer step an iteration, the default, the ratio is 1 and the gradient is the paper's, ``A * grad log
    p(response)``, divided by ``sampling.max_new_tokens``. With more steps each token's ratio is clipped as in PPO.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        group_size: responses to each prompt, at least 2.
        iterations: how often to sample; each time takes ``data.batch_size`` prompts.
        sampling: how responses are drawn.
        engine: what answers prompts; None takes this library's own decode loop, or transformers' generation where that
            cannot run the model, see docs/rollout.md.
        scores: from the reward's scores to those that are learnt from.
        kl: the KL penalty; ``coef`` is of the whole response.
        objective: the policy's loss; ``normalisation: constant`` keeps the sum over a response's tokens.
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
        group_size: PositiveInt = 4,
        iterations: PositiveInt = 100,
        sampling: RolloutOptions = RolloutOptions(),
        engine: RolloutEngine | None = None,
        scores: ScoreOptions = ScoreOptions(),
        kl: KLOptions = KLOptions(),
        objective: ObjectiveOptions = ObjectiveOptions(normalisation="constant"),
        update: UpdateOptions = UpdateOptions(),
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
            group_size=check_group(group_size),
        )
        self.objective = ClippedObjective(objective, kl, sampling.max_new_tokens)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """A response's advantage, the same at each of its tokens, is its reward less the mean of the others'."""
        rollout, scores = self.sample(batch)
        with self.phases.timed("score"), torch.no_grad():
            old = self.evaluate(rollout, scores, self.objective.known(rollout))
            rewards = self.shaping(scores, rollout) - self.kl.coef * self.kl.per_response(old, rollout.response_mask)
            advantages = leave_one_out_advantages(rewards, self.group_size)
            weights = rollout.prompts.weights
            tokenwise = advantages[:, None].expand_as(old.log_probs)
            experience = self.objective.experience(rollout, old, tokenwise, weights, self.totals)
        self.finish(rollout, scores, self.learn(experience))

    def counts(self, experience: Experience, rows: Tensor) -> Tensor:
        """What the policy's loss is divided by."""
        return self.objective.count(experience, rows)

    def loss(self, new: TokenScores, experience: Experience) -> Loss:
        """The clipped surrogate."""
        return self.objective(new, experience)
