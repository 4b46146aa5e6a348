"""ORPO: supervised fine-tuning on the chosen responses with an odds-ratio penalty, in one stage and one model."""

from __future__ import annotations

from torch import Tensor

from rlhf_lightning.algorithms.losses import log_odds, odds_ratio_loss
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.options import NonNegativeInt, PositiveFloat
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import JudgedLoss, JudgedPairs, pair_loss
from rlhf_lightning.training.sampler import SamplingOptions


class ORPOModule(PreferenceModule):
    """Odds ratio preference optimisation: Hong et al. 2024, arXiv 2403.07691, eq. 6.

    It can start from a pretrained model, SFT being a part of it. What is logged: see `PreferenceModule`, and
    ``train/sft_loss``, ``val/sft_loss``, nats a token of the chosen responses. Rewards are the log-odds of a response,
    with the geometric mean of its tokens' probabilities as its probability.

    Args:
        model: folder of the model to train.
        odds_coef: weight of the odds-ratio loss beside the SFT loss, the paper's lambda.
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
        odds_coef: PositiveFloat = 0.1,
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
        self.odds_coef = odds_coef

    def loss(self, log_probs: Tensor, experience: JudgedPairs) -> JudgedLoss:
        """The SFT loss, a mean over each chosen response's tokens, and the odds-ratio loss."""
        means = log_probs / experience.rows.response_tokens
        chosen, rejected = means.chunk(2)
        losses = -chosen + self.odds_coef * odds_ratio_loss(chosen, rejected)
        return pair_loss(losses, log_odds(means), log_probs, sft_loss=-chosen)
