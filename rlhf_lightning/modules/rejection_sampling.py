"""Rejection-sampling fine-tuning: imitate the best of several responses to each prompt.

Shapes: ``B`` kept responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.algorithms.losses import negative_log_likelihood
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.policy import TokenScores
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.options import NonNegativeInt, PositiveInt
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.best_of import best_rows
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.experience import Sampled
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import Loss
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions
from rlhf_lightning.training.shaping import ScoreOptions


class RejectionSamplingModule(OnPolicyModule):
    """RAFT (Dong et al. 2023, arXiv 2304.06767); rejection sampling of Touvron et al. 2023, arXiv 2307.09288.

    The loss is SFT's, the mean over a minibatch's tokens, at temperature 1 whatever the samples' was. The reference
    serves the logged KL alone: nothing holds the policy near it but the number of steps. Also logs
    ``rollout/kept_scores``, the mean score of the kept responses.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        group_size: responses to each prompt.
        keep: how many of them, the best by score, are learnt from; fewer than ``group_size``.
        iterations: how often to sample; each time takes ``data.batch_size`` prompts.
        sampling: how responses are drawn.
        engine: what answers prompts; None takes this library's own decode loop, or transformers' generation where that
            cannot run the model, see docs/rollout.md.
        scores: from the reward's scores to those that are learnt from.
        update: the optimizer steps of an iteration.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the sampling, the order of minibatches, and adapters.

    Raises:
        InputError: nothing would be rejected.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        reference: str | None = None,
        group_size: PositiveInt = 8,
        keep: PositiveInt = 1,
        iterations: PositiveInt = 100,
        sampling: RolloutOptions = RolloutOptions(),
        engine: RolloutEngine | None = None,
        scores: ScoreOptions = ScoreOptions(),
        update: UpdateOptions = UpdateOptions(),
        optimizer: AdamWOptions = AdamWOptions(learning_rate=1e-6, eps=1e-5),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        if keep >= group_size:
            raise InputError(f"model.keep: expected fewer than the {group_size} responses of group_size, got {keep}")
        super().__init__(
            model,
            reward=reward,
            reference=reference,
            iterations=iterations,
            sampling=sampling,
            engine=engine,
            scores=scores,
            kl=KLOptions(coef=0.0),
            update=update,
            optimizer=optimizer,
            lora=lora,
            network=network,
            seed=seed,
            group_size=group_size,
            rows_per_prompt=keep,
        )
        self.keep = keep

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Learns from the best responses."""
        rollout, scores = self.sample(batch)
        with self.phases.timed("score"), torch.no_grad():
            self.evaluate(rollout, scores, self.sampler.policy_log_probs(rollout))
            kept = best_rows(self.shaping(scores, rollout), self.group_size, self.keep).flatten()
            weights = rollout.prompts.weights[kept]
            self.totals.add("rollout/kept_scores", scores[kept], weights > 0)
            experience = Sampled(rollout.tokens[kept], rollout.lengths[kept], rollout.prompt_lengths[kept], weights)
        self.finish(rollout, scores, self.learn(experience))

    def counts(self, experience: Sampled, rows: Tensor) -> Tensor:
        """The number of tokens, which divides the loss."""
        return experience.mask[rows].sum()[None]

    def new_scores(self, micro: Sampled) -> TokenScores:
        """At temperature 1, as in supervised fine-tuning."""
        assert self.actors is not None
        scores: TokenScores = self.actors(*micro.inputs, temperature=1.0)
        return scores

    def loss(self, new: TokenScores, experience: Sampled) -> Loss:
        """The negative log-likelihood, summed over tokens."""
        mask = experience.mask
        metrics = {"policy/loss": (-new.log_probs, mask), "policy/entropy": (new.entropy, mask)}
        return Loss((negative_log_likelihood(new.log_probs, mask).sum(),), metrics)
