"""Direct preference optimisation: the policy learns from pairs, without a reward model and without sampling."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveFloat

from rlhf_lightning.algorithms.losses import PreferenceLoss, preference_loss
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.base import LabelSmoothing
from rlhf_lightning.modules.pairs import as_rows
from rlhf_lightning.modules.preference import PairTerms, ReferencedModule


class DPOModule(ReferencedModule):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives.

    What is logged: see `PreferenceModule`. Rewards are ``beta`` times the summed log-ratio to the reference.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        reference: folder of the frozen model that the policy is kept near; None takes ``model`` as it is at the start.
        beta: how strongly.
        loss: ``sigmoid`` (DPO); ``ipo`` (log-ratios averaged over the response's tokens) or ``ipo_sum`` (summed);
            ``hinge``.
        label_smoothing: the probability that a label is the wrong way round, below 0.5; for ``sigmoid`` alone.
        sft_coef: weight of the chosen responses' negative log-likelihood a token, added to the loss.
        kwargs: sampling, the optimizer's and the model's options, see `PolicyModule` and `RLHFModule`.
    """

    def __init__(
        self,
        model: str,
        reference: str | None = None,
        beta: PositiveFloat = 0.1,
        loss: PreferenceLoss = "sigmoid",
        label_smoothing: LabelSmoothing = 0.0,
        sft_coef: NonNegativeFloat = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, reference=reference, **kwargs)
        if label_smoothing > 0 and loss != "sigmoid":
            raise InputError(
                f"model.label_smoothing: {label_smoothing} has no meaning for loss {loss}; set it to 0, or use sigmoid"
            )
        self.beta = beta
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.sft_coef = sft_coef

    def terms(self, batch: PreferenceBatch) -> PairTerms:
        """The preference loss, and the SFT loss where it is asked for."""
        scores = self.row_scores(as_rows(batch))
        ratios = self.log_ratios(scores)
        scaled = ratios / scores.tokens if self.loss == "ipo" else ratios
        chosen, rejected = scaled.chunk(2)
        losses = preference_loss(chosen, rejected, self.beta, self.loss, self.label_smoothing)
        if self.sft_coef > 0:
            losses = losses - self.sft_coef * (scores.log_probs / scores.tokens).chunk(2)[0]
        return PairTerms(losses, self.beta * ratios, scores.log_probs)
