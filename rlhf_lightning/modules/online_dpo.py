"""Online DPO: the reward picks the best and the worst of fresh responses, and DPO learns from the pair.

Shapes: ``B`` pairs of this process, ``S`` prompt + response tokens, ``T`` response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.algorithms.losses import PreferenceLoss, negative_log_likelihood
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.policy import TokenScores
from rlhf_lightning.models.positions import response_mask
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.options import NonNegativeInt, PositiveFloat, PositiveInt
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.best_of import best_rows
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.experience import Pairs
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import Loss
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import LabelSmoothing, check_smoothing, preference_losses, wins
from rlhf_lightning.training.sampler import RolloutOptions
from rlhf_lightning.training.shaping import ScoreOptions, check_group
from rlhf_lightning.training.totals import Metrics


class OnlineDPOModule(OnPolicyModule):
    """Direct preference optimisation on the policy's own responses: Guo et al. 2024, arXiv 2402.04792.

    The judge is the reward: of a prompt's responses the best and the worst make the pair; where they score the same
    there is none. Logs beside what PPO does ``rewards/chosen``, ``rewards/rejected``, ``policy/accuracy``, as
    `DPOModule` does, and ``rollout/ties``, the share of prompts without a pair.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        group_size: responses to each prompt, at least 2.
        beta: the strength of the pull to the reference.
        loss_type: see `DPOModule`.
        label_smoothing: see `DPOModule`; for ``sigmoid`` alone.
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
        InputError: options contradict each other.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        reference: str | None = None,
        group_size: PositiveInt = 2,
        beta: PositiveFloat = 0.1,
        loss_type: PreferenceLoss = "sigmoid",
        label_smoothing: LabelSmoothing = 0.0,
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
        check_smoothing(label_smoothing, loss_type)
        super().__init__(
            model,
            reward=reward,
            reference=reference,
            iterations=iterations,
            sampling=sampling,
            engine=engine,
            scores=scores,
            kl=KLOptions(coef=beta),
            update=update,
            optimizer=optimizer,
            lora=lora,
            network=network,
            seed=seed,
            group_size=check_group(group_size),
            rows_per_prompt=1,  # a pair
        )
        self.beta = beta
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Learns from the best and the worst response to each prompt."""
        rollout, scores = self.sample(batch)
        with self.phases.timed("score"), torch.no_grad():
            old = self.evaluate(rollout, scores, self.sampler.policy_log_probs(rollout))
            shaped = self.shaping(scores, rollout)
            best, worst = best_rows(shaped, self.group_size), best_rows(-shaped, self.group_size)
            pairs = torch.cat([best, worst], dim=1)
            weights, ahead = rollout.prompts.weights[pairs[:, 0]], shaped[pairs[:, 0]] > shaped[pairs[:, 1]]
            self.totals.add("rollout/ties", ~ahead, weights > 0)
            reference = -negative_log_likelihood(old.reference_log_probs, rollout.response_mask)
            experience = Pairs(
                tokens=rollout.tokens[pairs],
                lengths=rollout.lengths[pairs],
                prompt_lengths=rollout.prompt_lengths[pairs],
                weights=weights * ahead,
                reference_log_probs=reference[pairs],
            )
        self.finish(rollout, scores, self.learn(experience))

    def counts(self, experience: Pairs, rows: Tensor) -> Tensor:
        """The number of pairs, which divides the loss."""
        return (experience.weights[rows] > 0).sum()[None]

    def loss(self, new: TokenScores, experience: Pairs) -> Loss:
        """The preference loss, summed over pairs."""
        _, lengths, prompt_lengths = experience.inputs
        mask = response_mask(prompt_lengths, lengths)
        log_probs = -negative_log_likelihood(new.log_probs, mask)
        ratios = log_probs.reshape(-1, 2) - experience.reference_log_probs
        tokens = mask.sum(dim=1).clamp(min=1).reshape(-1, 2)
        sides = ratios.T.flatten(), tokens.T.flatten()  # all best responses, then all worst ones
        losses = preference_losses(sides[0], sides[1], self.beta, self.loss_type, self.label_smoothing)
        paired = experience.weights > 0
        rewards = self.beta * ratios.detach()
        metrics: Metrics = {
            "policy/loss": (losses, paired),
            "policy/entropy": (new.entropy, mask & paired.repeat_interleave(2)[:, None]),
            "policy/accuracy": (wins(rewards[:, 0], rewards[:, 1]), paired),
            "rewards/chosen": (rewards[:, 0], paired),
            "rewards/rejected": (rewards[:, 1], paired),
        }
        return Loss((torch.where(paired, losses, 0.0).sum(),), metrics)
