"""The critic's options, and its start: a model of its own, or a head on the policy's trunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from rlhf_lightning.models.building import ModelFactory
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, Options, PositiveFloat
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.model import ModelReward


@dataclass(frozen=True, kw_only=True)
class CriticOptions(Options):
    """What estimates the value of a response that is not finished yet.

    Args:
        kind: ``model``, a model of its own; ``head``, a linear head on the policy's trunk.
        model: folder of a reward model that the critic starts from; None takes the reward's own model where there is
            one of the same vocabulary, and otherwise the policy's trunk with a fresh head.
        learning_rate: peak learning rate of the critic's own parameters; None takes that of ``optimizer``.
        warmup: iterations at the start in which only the critic's own parameters learn: a policy that follows a critic
            that knows nothing yet forgets first (value pretraining in Yue et al. 2025, arXiv 2504.05118). They are
            among ``iterations``, and their optimizer steps among those of the schedule.
        clip: how far a value may move from its old one before its loss is clipped; None for no clipping.
        coef: weight of the value loss.
    """

    kind: Literal["model", "head"] = "model"
    model: str | None = None
    learning_rate: PositiveFloat | None = None
    warmup: NonNegativeInt = 0
    clip: PositiveFloat | None = 0.2
    coef: NonNegativeFloat = 0.1

    @property
    def on_trunk(self) -> Literal["head"] | None:
        """What `Policy` is given: None for a critic that is a model of its own."""
        return "head" if self.kind == "head" else None


def start_critic(
    options: CriticOptions, factory: ModelFactory, policy: Policy, start: str, reward: Reward | None
) -> ScalarModel | None:
    """Loads a critic that is a model of its own. For one on the policy's trunk it starts the head and returns None.

    Args:
        options: which.
        factory: what loads it.
        policy: whose trunk it may share.
        start: the folder that the policy was loaded from.
        reward: whose model it may start from.
    """
    folder = options.model or _folder_of(reward, factory)
    if options.kind == "model":
        return factory.scalar(folder or start, fresh_head=folder is None)
    if folder is not None:
        _start_head(policy, folder, factory, asked=options.model is not None)
    return None


def _folder_of(reward: Reward | None, factory: ModelFactory) -> str | None:
    """The folder of the reward's own model, where its token ids mean what the policy's do; None without one."""
    if reward is None:
        return None
    for part in reward.modules():
        if isinstance(part, ModelReward):
            tokenizer = load_tokenizer(part.path, factory.network.trust_remote_code)
            return part.path if same_vocabulary(factory.tokenizer, tokenizer) else None
    return None


def _start_head(policy: Policy, folder: str, factory: ModelFactory, asked: bool) -> None:
    """Starts the head from the reward model's. Where widths differ and nobody named that model, it stays fresh."""
    assert policy.critic_head is not None
    model = load_scalar_model(folder, fresh_head=False, trust_remote_code=factory.network.trust_remote_code)
    start, head = ScalarModel(model), cast(torch.nn.Linear, model.score).weight.detach()
    if asked or head.shape == policy.critic_head.weight.shape:
        policy.load_critic_head(head / start.reward_std, -start.reward_mean / start.reward_std)
