"""SimPO: pairs judged by the length-normalised likelihood itself, with a margin and without a reference."""

from __future__ import annotations

from torch import Tensor

from rlhf_lightning.algorithms.losses import simpo_loss
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, PositiveFloat
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import JudgedLoss, JudgedPairs, pair_loss
from rlhf_lightning.training.sampler import SamplingOptions


class SimPOModule(PreferenceModule):
    """Simple preference optimisation: Meng et al. 2024, arXiv 2405.14734, eq. 6.

    What is logged: see `PreferenceModule`. Rewards are ``beta`` times the mean log-prob of the response's tokens.
    Nothing but the number of steps and the learning rate holds the policy near where it started.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        beta: scale of the reward.
        gamma: by how much the chosen response's reward should be ahead.
        sampling: how ``predict`` and the sample tables draw responses; the training draws none.
        engine: what answers there; see `SFTModule`.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the sampling, and of adapters.
    """

    def __init__(
        self,
        model: str,
        beta: PositiveFloat = 2.0,
        gamma: NonNegativeFloat = 1.0,
        sampling: SamplingOptions = SamplingOptions(),
        engine: RolloutEngine | None = None,
        optimizer: AdamWOptions = AdamWOptions(),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            model,
            sampling=sampling,
            engine=engine,
            optimizer=optimizer,
            lora=lora,
            network=network,
            seed=seed,
        )
        self.beta = beta
        self.gamma = gamma

    def loss(self, log_probs: Tensor, experience: JudgedPairs) -> JudgedLoss:
        """The loss of the mean log-probs."""
        means = log_probs / experience.rows.response_tokens
        chosen, rejected = means.chunk(2)
        losses = simpo_loss(chosen, rejected, self.beta, self.gamma)
        return pair_loss(losses, self.beta * means, log_probs)
