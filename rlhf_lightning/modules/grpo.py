"""GRPO: several responses to each prompt, and the group's own mean and deviation in place of a critic.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.algorithms.advantages import group_advantages, varied_groups
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.collectives import all_reduce_sum, largest, rank, world_size
from rlhf_lightning.errors import InputError
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


class GRPOModule(OnPolicyModule):
    """Group relative policy optimisation: Shao et al. 2024, arXiv 2402.03300.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is ``scale_by_std: false``, ``objective.normalisation: constant`` and
    ``kl.loss_coef: 0``. DAPO (Yu et al. 2025, arXiv 2503.14476) is ``objective.clip_high: 0.28``,
    ``objective.normalisation: token``, ``dynamic_sampling: true`` with ``train_prompts``, and ``kl.loss_coef: 0``. Logs
    beside what PPO does ``rollout/equal_groups``, the share of groups of equal scores, and
    ``rollout/informative_groups``, the number of the others.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        group_size: responses to each prompt, at least 2.
        scale_by_std: divide a group's advantages by the deviation of its rewards.
        dynamic_sampling: leave groups of equal scores out of the update; otherwise they count in its means.
        train_prompts: with ``dynamic_sampling``, learn from the first so many of the groups that are left, in the
            prompts' order over all processes, so that minibatches keep their size (section 3.2 of DAPO, which samples
            on until there are enough; here ``data.batch_size`` is the reserve). Where fewer are left, from those. None
            learns from all.
        iterations: how often to sample; each time takes ``data.batch_size`` prompts.
        sampling: how responses are drawn.
        engine: what answers prompts; None takes this library's own decode loop, or transformers' generation where that
            cannot run the model, see docs/rollout.md.
        scores: from the reward's scores to those that are learnt from.
        kl: the KL penalty; ``coef`` is of the whole response, and ``loss_estimator`` None takes k3.
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
        group_size: PositiveInt = 8,
        scale_by_std: bool = True,
        dynamic_sampling: bool = False,
        train_prompts: PositiveInt | None = None,
        iterations: PositiveInt = 100,
        sampling: RolloutOptions = RolloutOptions(),
        engine: RolloutEngine | None = None,
        scores: ScoreOptions = ScoreOptions(),
        kl: KLOptions = KLOptions(coef=0.0, loss_coef=0.04),
        objective: ObjectiveOptions = ObjectiveOptions(normalisation="sequence"),
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
        if train_prompts is not None and not dynamic_sampling:
            raise InputError(
                f"model.train_prompts: {train_prompts} has no meaning without model.dynamic_sampling; set both, or none"
            )
        self.objective = ClippedObjective(objective, kl, sampling.max_new_tokens, kl_estimator="k3")
        self.scale_by_std = scale_by_std
        self.dynamic_sampling, self.train_prompts = dynamic_sampling, train_prompts

    def check_minibatches(self, prompts: int) -> None:
        """See `OnPolicyModule.check_minibatches`; also InputError where ``train_prompts`` are more than are sampled."""
        if self.train_prompts is not None and self.train_prompts > prompts:
            raise InputError(
                f"model.train_prompts: {self.train_prompts} are more than the {prompts} prompts of an iteration; raise "
                "data.batch_size above it, or lower it"
            )
        super().check_minibatches(self.train_prompts or prompts)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """A response's advantage, the same at each of its tokens, is its reward relative to its group's."""
        rollout, scores = self.sample(batch)
        with self.phases.timed("score"), torch.no_grad():
            old = self.evaluate(rollout, scores, self.objective.known(rollout))
            shaped = self.shaping(scores, rollout)
            rewards = shaped - self.kl.coef * self.kl.per_response(old, rollout.response_mask)
            advantages = group_advantages(rewards, self.group_size, self.scale_by_std)
            weights = self.informative(shaped, rollout.prompts.weights)
            tokenwise = advantages[:, None].expand_as(old.log_probs)
            experience = self.objective.experience(rollout, old, tokenwise, weights, self.totals)
        self.finish(rollout, scores, self.learn(experience))

    def informative(self, scores: Tensor, weights: Tensor) -> Tensor:
        """The weights ``[B]`` with 0 at the groups that ``dynamic_sampling`` leaves out; counts the groups."""
        varied = varied_groups(scores, self.group_size)
        self.totals.add("rollout/equal_groups", ~varied, weights > 0)
        kept = (varied & (weights > 0))[:: self.group_size]
        self.totals.add("rollout/informative_groups", all_reduce_sum(kept.sum()))
        if self.train_prompts is not None:
            kept = first_of_all(kept, self.train_prompts)
        return weights * kept.repeat_interleave(self.group_size) if self.dynamic_sampling else weights

    def counts(self, experience: Experience, rows: Tensor) -> Tensor:
        """What the policy's loss is divided by."""
        return self.objective.count(experience, rows)

    def loss(self, new: TokenScores, experience: Experience) -> Loss:
        """The clipped surrogate."""
        return self.objective(new, experience)


def first_of_all(flags: Tensor, most: int) -> Tensor:
    """Of this process's ``flags`` ``[P]``, bool, those that are among the first ``most`` true ones of all processes.

    The order is that of the whole batch: its prompt i lies with process ``i % world``.
    """
    width = largest(len(flags))
    everywhere = torch.zeros(width, world_size(), dtype=torch.int64, device=flags.device)
    everywhere[: len(flags), rank()] = flags.long()
    everywhere = all_reduce_sum(everywhere)
    place = everywhere.flatten().cumsum(0).reshape(everywhere.shape)[: len(flags), rank()]
    return flags & (place <= most)
