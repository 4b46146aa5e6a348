"""The critic beside the policy: where it starts, what it is asked, and how its parameters are trained.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens. The critic is asked about
``T + 1`` states: before each response token, and after the last one.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import TokenScores
from rlhf_lightning.models.positions import response_states
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.policy_gradient import PolicyGradientModule
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.model import ModelReward

CriticKind = Literal["model", "head"]


class ActorCriticModule(PolicyGradientModule):
    """A policy-gradient module with a critic.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response.
        critic: ``model``, a model of its own; ``head``, a linear head on the policy's trunk; or a number N, a branch
            of its own that starts as a copy of the policy's last N layers.
        critic_from: folder of a reward model that the critic starts from; None takes the reward's own model where there
            is one of the same vocabulary, and otherwise the policy's trunk with a fresh head.
        critic_learning_rate: peak learning rate of the critic's own parameters; None takes ``learning_rate``.
        critic_warmup: iterations at the start in which only the critic's own parameters learn: a policy that follows a
            critic that knows nothing yet forgets first (value pretraining in Yue et al. 2025, arXiv 2504.05118). They
            are among ``iterations``, and their optimizer steps among those of the schedule.
        kwargs: the policy's loss, the loop, models, sampling, optimizer: see `PolicyGradientModule`.

    Raises: InputError when the critic's warm-up would leave the policy no iteration.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        critic: CriticKind | PositiveInt = "model",
        critic_from: str | None = None,
        critic_learning_rate: PositiveFloat | None = None,
        critic_warmup: NonNegativeInt = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        if critic_warmup >= self.iterations:
            raise InputError(
                f"model.critic_warmup: after {critic_warmup} iterations of the critic alone none of the "
                f"{self.iterations} are left for the policy; raise model.iterations or lower it"
            )
        self.trunk_critic = None if critic == "model" else cast("Literal['head'] | int", critic)
        self.critic_from = critic_from
        self.critic_learning_rate = critic_learning_rate
        self.critic_warmup = critic_warmup
        self.critic: ScalarModel | None = None

    # ------------------------------------------------------------------ building the models

    def configure_model(self) -> None:
        """Load, shard and ready all models; called again for every stage, does it once."""
        if self.policy is not None:
            return
        super().configure_model()
        folder = self.critic_from or self.reward_folder()
        if self.trunk_critic is None:
            self.critic = self.build_scalar(folder or self.model, fresh_head=folder is None, seed=self.seed)
        elif folder is not None:
            self.start_head_from(folder)

    def shape_options(self) -> dict[str, Any]:
        """See `RLHFModule.shape_options`; with the kind of critic."""
        return {**super().shape_options(), "critic": "model" if self.trunk_critic is None else self.trunk_critic}

    def reward_folder(self) -> str | None:
        """The folder of the reward's own model, where its token ids mean what the policy's do; None without one."""
        if self.reward is None:
            return None
        for part in self.reward.modules():
            if isinstance(part, ModelReward):
                tokenizer = load_tokenizer(part.path, self.trust_remote_code)
                return part.path if same_vocabulary(self.tokenizer, tokenizer) else None
        return None

    def start_head_from(self, folder: str) -> None:
        """Give the shared-trunk critic the reward model's head; fresh where widths differ and nobody asked for it."""
        assert self.policy is not None and self.policy.critic_head is not None
        model = load_scalar_model(folder, fresh_head=False, trust_remote_code=self.trust_remote_code)
        start, head = ScalarModel(model), cast(torch.nn.Linear, model.score).weight.detach()
        if self.critic_from is not None or head.shape == self.policy.critic_head.weight.shape:
            self.policy.load_critic_head(head / start.reward_std, -start.reward_mean / start.reward_std)

    def own_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained of the policy, and of the critic alone; a trunk that they share is the policy's."""
        assert self.policy is not None
        parts = [part for part in (self.critic, self.policy.branch, self.policy.critic_head) if part is not None]
        critic = [p for part in parts for p in part.parameters() if p.requires_grad]
        own = {id(p) for p in critic}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own], critic

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The critic's own parameters with their own learning rate."""
        policy, critic = self.own_parameters()
        rate = self.critic_learning_rate or self.learning_rate
        return self.decay_groups(policy, self.learning_rate) + self.decay_groups(critic, rate)

    @property
    def warming_up(self) -> bool:
        """Whether the critic learns alone. The policy's passes are then made without a graph."""
        return self.iteration < self.critic_warmup

    def no_loss(self) -> Tensor | float:
        """What a loss in which the policy has no part is given for it: 0.

        DDP waits for a gradient of every parameter, so there it is a 0 that has one; no pass is run backward for it.
        """
        if not isinstance(self.trainer.strategy.model, DistributedDataParallel):
            return 0.0
        return sum((0.0 * parameter).sum() for parameter in self.own_parameters()[0])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """See `OnPolicyModule.on_before_optimizer_step`; while the critic warms up the policy has no gradient.

        None, and not 0: AdamW passes over such parameters, where it would decay others, and count the step. Their state
        is made all the same, as it is before a first step: a sharded checkpoint must have every parameter's.
        """
        if self.warming_up:
            if isinstance(self.policy, FSDPModule):
                self.policy.reshard()  # as a backward pass would have; the optimizer knows the shards alone
            for parameter in self.own_parameters()[0]:
                parameter.grad = None
                if parameter not in optimizer.state:
                    place = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
                    optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=place),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        super().on_before_optimizer_step(optimizer)

    def networks(self) -> dict[str, nn.Module]:
        """The policy, and a critic that is a model of its own."""
        return super().networks() | ({} if self.critic is None else {"critic": self.critic})

    # ------------------------------------------------------------------ passes over responses

    def token_scores(self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, temperature: float) -> TokenScores:
        """See `SamplingModule.token_scores`; with the critic's values ``[B, T + 1]``."""
        assert self.policy is not None
        now = self.policy(tokens, lengths, prompt_lengths, temperature, trained=not self.warming_up)
        return now if self.critic is None else now._replace(values=self.own_values(tokens, lengths, prompt_lengths))

    def own_values(self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor | None:
        """See `SamplingModule.own_values`."""
        if self.critic is None:
            return None
        # One state more than there are response tokens: the one after the last, which a bootstrap needs.
        return response_states(self.critic(tokens, lengths), prompt_lengths, lengths + 1)


def values_at_the_cut(rollout: Rollout, values: Tensor) -> Tensor:
    """The critic's value of the state after the last token, on the last token's slot, at truncated rows; else 0.

    ``values`` is ``[B, T + 1]``, and so is the result: discounted, it stands for those rows' scores in the rewards.
    """
    lengths = rollout.response_lengths[:, None]
    after = values.gather(1, lengths)
    cut = (rollout.truncated & (rollout.prompts.weights > 0))[:, None]
    return torch.zeros_like(values).scatter(1, (lengths - 1).clamp(min=0), torch.where(cut, after, 0.0))
