"""Direct preference optimisation: the policy learns from pairs, without a reward model and without sampling."""

from __future__ import annotations

from torch import Tensor

from rlhf_lightning.algorithms.losses import PreferenceLoss
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, PositiveFloat
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.frozen_reference import FrozenReference
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import (
    JudgedLoss,
    JudgedPairs,
    LabelSmoothing,
    check_smoothing,
    pair_loss,
    preference_losses,
)
from rlhf_lightning.training.sampler import SamplingOptions


class DPOModule(PreferenceModule):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives.

    What is logged: see `PreferenceModule`. Rewards are ``beta`` times the summed log-ratio to the reference.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        reference: folder of the frozen model that the policy is kept near; None takes ``model`` as it is at the start.
        beta: how strongly.
        loss_type: ``sigmoid`` (DPO); ``ipo`` (log-ratios averaged over the response's tokens) or ``ipo_sum`` (summed);
            ``hinge``.
        label_smoothing: the probability that a label is the wrong way round, below 0.5; for ``sigmoid`` alone.
        sft_coef: weight of the chosen responses' negative log-likelihood a token, added to the loss.
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
        reference: str | None = None,
        beta: PositiveFloat = 0.1,
        loss_type: PreferenceLoss = "sigmoid",
        label_smoothing: LabelSmoothing = 0.0,
        sft_coef: NonNegativeFloat = 0.0,
        sampling: SamplingOptions = SamplingOptions(),
        engine: RolloutEngine | None = None,
        optimizer: AdamWOptions = AdamWOptions(),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            model,
            reference=FrozenReference(reference),
            sampling=sampling,
            engine=engine,
            optimizer=optimizer,
            lora=lora,
            network=network,
            seed=seed,
        )
        check_smoothing(label_smoothing, loss_type)
        self.beta = beta
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.sft_coef = sft_coef

    def loss(self, log_probs: Tensor, experience: JudgedPairs) -> JudgedLoss:
        """The preference loss, equation 7, and the SFT loss where it is asked for."""
        ratios, tokens = experience.log_ratios(log_probs), experience.rows.response_tokens
        losses = preference_losses(ratios, tokens, self.beta, self.loss_type, self.label_smoothing)
        if self.sft_coef > 0:
            losses = losses - self.sft_coef * (log_probs / tokens).chunk(2)[0]
        return pair_loss(losses, self.beta * ratios, log_probs)
