"""What the methods that learn from judgements alone share: one pass over the responses, the reference, the metrics.

Shapes: ``B`` pairs of this process, ``T`` response tokens. A pair's two rows stand apart: row ``b`` of ``2B`` is pair
``b``'s chosen response, row ``B + b`` its rejected one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.algorithms.losses import negative_log_likelihood
from rlhf_lightning.batches import PreferenceBatch, View
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import Reference
from rlhf_lightning.modules.balancing import router_loss
from rlhf_lightning.modules.pairs import Rows, weighted_sum
from rlhf_lightning.modules.policy import PolicyModule
from rlhf_lightning.modules.reward_model import wins
from rlhf_lightning.modules.totals import Totals


class PairTerms(NamedTuple):
    """What the loss and the metrics of the pairs are made of."""

    losses: Tensor  # [B]
    rewards: Tensor  # [2B] what the method takes for the responses' rewards; no gradient is asked of these
    log_probs: Tensor  # [2B] summed over the response, under the policy
    more: Mapping[str, Tensor] = MappingProxyType({})  # other metrics, [B] each, by name


class RowScores(NamedTuple):
    """Both responses of every pair under the policy."""

    rows: Rows
    mask: Tensor  # [2B, T] bool, the response tokens that count
    log_probs: Tensor  # [2B] summed over them

    @property
    def tokens(self) -> Tensor:
        """``[2B]`` int64, tokens of the response that count; 1 where none does, so that it can be divided by."""
        return self.mask.sum(dim=1).clamp(min=1)


class PreferenceModule(PolicyModule):
    """The base of the methods without sampling and without a reward model; a method says what its ``terms`` are.

    Logs ``train/loss``, ``train/accuracy``, ``train/margin``, ``rewards/chosen``, ``rewards/rejected``,
    ``logps/chosen`` and ``logps/rejected``; held out ``val/loss``, ``val/accuracy``, ``val/margin`` and so on. The loss
    is the mean over the pairs of an optimizer step, each weighted by its weight.
    """

    data_view = View("pairs")

    def terms(self, batch: PreferenceBatch) -> PairTerms:
        """Losses, rewards and log-probs of the pairs."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(batch)")

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the pairs' losses."""
        terms = self.terms(batch)
        assert self.policy is not None
        total, both = batch.weights.sum(), (batch.weights > 0).repeat(2)
        loss = weighted_sum(terms.losses, batch.weights) + router_loss(self.policy, both, total, self.step_totals)
        self.count(total, loss, tokens=batch.chosen.lengths.sum() + batch.rejected.lengths.sum())
        self._add_metrics(batch, terms, self.step_totals, "train/", ("rewards/", "logps/"))
        return loss

    def measure(self, batch: PreferenceBatch, totals: Totals) -> None:
        """Loss, accuracy and margin of the rewards, and the rewards and log-probs themselves."""
        self._add_metrics(batch, self.terms(batch), totals, "", ("rewards_", "logps_"))

    def row_scores(self, rows: Rows) -> RowScores:
        """The rows of any pairs in one forward pass."""
        assert self.policy is not None
        log_probs = self.policy(rows.tokens, rows.lengths, rows.prompt_lengths).log_probs
        return RowScores(rows, rows.response_mask, -negative_log_likelihood(log_probs, rows.response_mask))

    def _add_metrics(
        self, batch: PreferenceBatch, terms: PairTerms, totals: Totals, prefix: str, groups: tuple[str, str]
    ) -> None:
        counted = batch.weights > 0
        chosen, rejected = terms.rewards.chunk(2)
        totals.add(f"{prefix}loss", terms.losses, batch.weights)
        totals.add(f"{prefix}accuracy", wins(chosen, rejected), counted)
        totals.add(f"{prefix}margin", chosen - rejected, counted)
        for group, values in zip(groups, (terms.rewards, terms.log_probs), strict=True):
            chosen, rejected = values.chunk(2)
            totals.add(f"{group}chosen", chosen, counted)
            totals.add(f"{group}rejected", rejected, counted)
        for name, values in terms.more.items():
            totals.add(prefix + name, values, counted)


class ReferencedModule(PreferenceModule):
    """A method that holds the policy near a frozen reference.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        reference: folder of the frozen model that the policy is kept near; None takes ``model`` as it is at the start.
        kwargs: sampling, the optimizer's and the model's options, see `PolicyModule` and `RLHFModule`.
    """

    def __init__(self, model: str, reference: str | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.reference_folder = reference
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

    def on_validation_start(self) -> None:
        """Refuse to measure a model against itself; see `_refuse_itself`."""
        super().on_validation_start()
        self._refuse_itself()

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        super().on_test_start()
        self._refuse_itself()

    def _refuse_itself(self) -> None:
        """InputError where nothing has been trained and the reference is the model: every margin would be 0."""
        trainer = self.trainer
        if trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            return
        given = self.reference_folder
        same = given is None or Path(given).expanduser().resolve() == Path(self.model).expanduser().resolve()
        if same and trainer.ckpt_path is None and trainer.global_step == 0:
            raise InputError(
                f"model.reference: {given or self.model} is the model that is measured too, and against itself all "
                "rewards and margins are 0: give the trained model's folder as model.model and the one that it started "
                "from as model.reference, or a checkpoint by --ckpt_path"
            )

    def log_ratios(self, scores: RowScores) -> Tensor:
        """``[2B]``, the responses' summed log-probs under the policy less those under the reference."""
        assert self.reference is not None
        with torch.no_grad():
            rows = scores.rows
            log_probs = self.reference(rows.tokens, rows.lengths, rows.prompt_lengths).log_probs
            reference = -negative_log_likelihood(log_probs, scores.mask)
        return scores.log_probs - reference
