"""SimPO: pairs judged by the length-normalised likelihood itself, with a margin and without a reference."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveFloat

from rlhf_lightning.algorithms.losses import simpo_loss
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.modules.pairs import as_rows
from rlhf_lightning.modules.preference import PairTerms, PreferenceModule


class SimPOModule(PreferenceModule):
    """Simple preference optimisation: Meng et al. 2024, arXiv 2405.14734, eq. 6.

    What is logged: see `PreferenceModule`. Rewards are ``beta`` times the mean log-prob of the response's tokens.
    Nothing but the number of steps and the learning rate holds the policy near where it started.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        beta: scale of the reward.
        gamma: by how much the chosen response's reward should be ahead.
        kwargs: sampling, the optimizer's and the model's options, see `PolicyModule` and `RLHFModule`.
    """

    def __init__(self, model: str, beta: PositiveFloat = 2.0, gamma: NonNegativeFloat = 1.0, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.beta = beta
        self.gamma = gamma

    def terms(self, batch: PreferenceBatch) -> PairTerms:
        """The loss of the mean log-probs."""
        scores = self.row_scores(as_rows(batch))
        means = scores.log_probs / scores.tokens
        chosen, rejected = means.chunk(2)
        losses = simpo_loss(chosen, rejected, self.beta, self.gamma)
        return PairTerms(losses, self.beta * means, scores.log_probs)
