"""Direct preference optimisation: the policy learns from pairs, without a reward model and without sampling.

Shapes: ``B`` pairs of this process, ``T`` response tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from torch import Tensor

from rlhf_lightning.algorithms.losses import PreferenceLoss, negative_log_likelihood, preference_loss
from rlhf_lightning.batches import PreferenceBatch, View
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import Reference
from rlhf_lightning.models.positions import response_mask
from rlhf_lightning.modules.base import LabelSmoothing
from rlhf_lightning.modules.pairs import as_rows, weighted_sum
from rlhf_lightning.modules.policy import PolicyModule
from rlhf_lightning.modules.reward_model import wins
from rlhf_lightning.modules.totals import Totals


class PairTerms(NamedTuple):
    """What the loss and the metrics of a pair are made of, ``[B]`` each."""

    losses: Tensor
    chosen_rewards: Tensor  # beta times the summed log-ratio of policy to reference
    rejected_rewards: Tensor
    chosen_log_probs: Tensor  # summed over the response, under the policy
    rejected_log_probs: Tensor


class DPOModule(PolicyModule):
    """Direct preference optimisation and its relatives.

    Logs ``train/loss``, ``train/accuracy``, ``train/margin``, ``rewards/chosen``, ``rewards/rejected``,
    ``logps/chosen`` and ``logps/rejected``; held out ``val/loss``, ``val/accuracy``, ``val/margin`` and so on. Rewards
    are ``beta`` times the summed log-ratio to the reference.

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

    data_view = View("pairs")

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
        super().__init__(model=model, **kwargs)
        if label_smoothing > 0 and loss != "sigmoid":
            raise InputError(
                f"model.label_smoothing: {label_smoothing} has no meaning for loss {loss}; set it to 0, or use sigmoid"
            )
        self.reference_folder = reference
        self.beta = beta
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.sft_coef = sft_coef
        self.reference: Reference | None
        self.keep_frozen("reference", None)

    def configure_model(self) -> None:
        """Load (and shard) the policy and its reference, which share nothing; only the first call counts.

        Raises:
            InputError: the two have different vocabularies.
        """
        super().configure_model()
        if self.reference is not None:
            return
        folder = self.reference_folder or self.model
        if folder != self.model and not same_vocabulary(self.tokenizer, load_tokenizer(folder, self.trust_remote_code)):
            raise InputError(
                f"model.reference: {folder} has another vocabulary than {self.model}; give one with the same"
            )
        self.keep_frozen("reference", self.build_reference(self.reference_folder))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the pairs' losses."""
        terms = self.terms(batch)
        loss = weighted_sum(terms.losses, batch.weights)
        self.count(batch.weights.sum(), loss, tokens=batch.chosen.lengths.sum() + batch.rejected.lengths.sum())
        self._add_metrics(batch, terms, self.step_totals, "train/", ("rewards/", "logps/"))
        return loss

    def measure(self, batch: PreferenceBatch, totals: Totals) -> None:
        """Loss, accuracy and margin of the implied rewards, and the rewards and log-probs themselves."""
        self._add_metrics(batch, self.terms(batch), totals, "", ("rewards_", "logps_"))

    def terms(self, batch: PreferenceBatch) -> PairTerms:
        """Losses, implied rewards and log-probs of the pairs."""
        assert self.policy is not None and self.reference is not None
        rows = as_rows(batch)
        mask = response_mask(rows.prompt_lengths, rows.lengths)
        log_probs = -negative_log_likelihood(self.policy(*rows).log_probs, mask)  # [2B]
        with torch.no_grad():
            reference = -negative_log_likelihood(self.reference(*rows).log_probs, mask)
        ratios = log_probs - reference
        tokens = mask.sum(dim=1).clamp(min=1)
        scaled = ratios / tokens if self.loss == "ipo" else ratios
        chosen, rejected = scaled.chunk(2)
        losses = preference_loss(chosen, rejected, self.beta, self.loss, self.label_smoothing)
        if self.sft_coef > 0:
            losses = losses - self.sft_coef * (log_probs / tokens).chunk(2)[0]
        return PairTerms(losses, *(self.beta * ratios).detach().chunk(2), *log_probs.detach().chunk(2))

    def _add_metrics(
        self, batch: PreferenceBatch, terms: PairTerms, totals: Totals, prefix: str, groups: tuple[str, str]
    ) -> None:
        counted = batch.weights > 0
        totals.add(f"{prefix}loss", terms.losses, batch.weights)
        totals.add(f"{prefix}accuracy", wins(terms.chosen_rewards, terms.rejected_rewards), counted)
        totals.add(f"{prefix}margin", terms.chosen_rewards - terms.rejected_rewards, counted)
        totals.add(f"{groups[0]}chosen", terms.chosen_rewards, counted)
        totals.add(f"{groups[0]}rejected", terms.rejected_rewards, counted)
        totals.add(f"{groups[1]}chosen", terms.chosen_log_probs, counted)
        totals.add(f"{groups[1]}rejected", terms.rejected_log_probs, counted)
