"""GRPO: several responses to each prompt, and the group's own mean and deviation in place of a critic.

Shapes: ``B`` responses of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from torch import Tensor

from rlhf_lightning.algorithms.advantages import group_advantages, varied_groups
from rlhf_lightning.algorithms.losses import LossNormalisation
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_sum, largest, rank, world_size
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.experience import Experience
from rlhf_lightning.modules.on_policy_metrics import count_rollout
from rlhf_lightning.modules.policy_gradient import PolicyGradientModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward


class GRPOModule(PolicyGradientModule):
    """Group relative policy optimisation: Shao et al. 2024, arXiv 2402.03300.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is ``scale_by_std: false``, ``loss_normalisation: constant`` and
    ``kl_loss_coef: 0``. DAPO (Yu et al. 2025, arXiv 2503.14476) is ``clip_high: 0.28``, ``loss_normalisation: token``,
    ``dynamic_sampling: true`` with ``train_prompts`` and ``kl_loss_coef: 0``. Logs beside what PPO does
    ``rollout/equal_groups``, the share of groups of equal scores, and ``rollout/informative_groups``, the number of the
    others.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        group_size: responses to each prompt, at least 2.
        scale_by_std: divide a group's advantages by the deviation of its rewards.
        dynamic_sampling: leave groups of equal scores out of the update; otherwise they count in its means.
        train_prompts: with ``dynamic_sampling``, learn from the first so many of the groups that are left, in the
            prompts' order over all processes, so that minibatches keep their size (section 3.2 of DAPO, which samples
            on until there are enough; here ``data.batch_size`` is the reserve). Where fewer are left, from those. None
            learns from all.
        kl_coef: penalty per nat in the reward, of the whole response.
        kl_loss_coef: weight of the KL term in the loss.
        kl_loss_estimator: k2 or k3; None takes k3.
        loss_normalisation: see `PolicyGradientModule`.
        kwargs: see `PolicyGradientModule`.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        group_size: PositiveInt = 8,
        scale_by_std: bool = True,
        dynamic_sampling: bool = False,
        train_prompts: PositiveInt | None = None,
        kl_coef: NonNegativeFloat = 0.0,
        kl_loss_coef: NonNegativeFloat = 0.04,
        kl_loss_estimator: Literal["k2", "k3"] | None = None,
        loss_normalisation: LossNormalisation = "sequence",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            reward,
            kl_coef=kl_coef,
            kl_loss_coef=kl_loss_coef,
            kl_loss_estimator=kl_loss_estimator or ("k3" if kl_loss_coef > 0 else None),
            loss_normalisation=loss_normalisation,
            **kwargs,
        )
        self.group_size = self.checked_group(group_size)
        self.scale_by_std = scale_by_std
        if train_prompts is not None and not dynamic_sampling:
            raise InputError(
                f"model.train_prompts: {train_prompts} has no meaning without model.dynamic_sampling; set both, or none"
            )
        self.dynamic_sampling, self.train_prompts = dynamic_sampling, train_prompts

    def check_minibatches(self, prompts: int) -> None:
        """See `OnPolicyModule.check_minibatches`; also InputError where ``train_prompts`` are more than are sampled."""
        if self.train_prompts is not None and self.train_prompts > prompts:
            raise InputError(
                f"model.train_prompts: {self.train_prompts} are more than the {prompts} prompts of an iteration; raise "
                "data.batch_size above it, or lower it"
            )
        super().check_minibatches(self.train_prompts or prompts)

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Experience:
        """A response's advantage, the same at each of its tokens, is its reward relative to its group's."""
        now = self.assess(rollout)
        count_rollout(totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        rewards = self.response_rewards(scores, rollout, now)
        advantages = group_advantages(rewards, self.group_size, self.scale_by_std)
        weights = rollout.prompts.weights
        varied = varied_groups(self.shaped(scores, rollout), self.group_size)
        totals.add("rollout/equal_groups", ~varied, weights > 0)
        informative = (varied & (weights > 0))[:: self.group_size]
        totals.add("rollout/informative_groups", all_reduce_sum(informative.sum()))
        if self.train_prompts is not None:
            informative = first_of_all(informative, self.train_prompts)
        if self.dynamic_sampling:
            weights = weights * informative.repeat_interleave(self.group_size)
        return self.experience(rollout, now, advantages[:, None].expand_as(now.log_probs), weights, totals)


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
