"""ORPO: supervised fine-tuning on the chosen responses with an odds-ratio penalty, in one stage and one model."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import PositiveFloat

from rlhf_lightning.algorithms.losses import log_odds, odds_ratio_loss
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.modules.pairs import as_rows
from rlhf_lightning.modules.preference import PairTerms, PreferenceModule


class ORPOModule(PreferenceModule):
    """Odds ratio preference optimisation: Hong et al. 2024, arXiv 2403.07691, eq. 6.

    It can start from a pretrained model, SFT being a part of it. What is logged: see `PreferenceModule`, and
    ``train/sft_loss``, ``val/sft_loss``, nats a token of the chosen responses. Rewards are the log-odds of a response,
    with the geometric mean of its tokens' probabilities as its probability.

    Args:
        model: folder of the model to train.
        odds_coef: weight of the odds-ratio loss beside the SFT loss, the paper's lambda.
        kwargs: sampling, the optimizer's and the model's options, see `PolicyModule` and `RLHFModule`.
    """

    def __init__(self, model: str, odds_coef: PositiveFloat = 0.1, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.odds_coef = odds_coef

    def terms(self, batch: PreferenceBatch) -> PairTerms:
        """The SFT loss, a mean over each chosen response's tokens, and the odds-ratio loss."""
        scores = self.row_scores(as_rows(batch))
        means = scores.log_probs / scores.tokens
        chosen, rejected = means.chunk(2)
        losses = -chosen + self.odds_coef * odds_ratio_loss(chosen, rejected)
        return PairTerms(losses, log_odds(means), scores.log_probs, {"sft_loss": -chosen})
