"""The reward model: one score for a response, trained so that the preferred response of a pair scores higher.

Shapes: ``B`` pairs of this process, ``S`` prompt + response tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.classification import BinaryCalibrationError

from rlhf_lightning.algorithms.losses import bradley_terry_loss
from rlhf_lightning.batches import PreferenceBatch, View
from rlhf_lightning.collectives import all_reduce_sum, rank
from rlhf_lightning.errors import check_choice
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt
from rlhf_lightning.training.balancing import router_loss
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import LabelSmoothing, as_rows, decided, weighted_sum, wins
from rlhf_lightning.training.totals import Totals

HeadKind = Literal["fresh", "trained"]
Normalisation = Literal["none", "mean", "mean_and_std"]


class RewardModelModule(RLHFModule):
    """A reward model trained on pairs by the Bradley-Terry loss.

    A row's ``preference`` is the probability that its chosen response is preferred. Pairs with 0.5, a tie, count in the
    loss and in ``val/brier``, and in no accuracy.

    Logs ``train/loss`` and ``train/accuracy``; held out: ``val/loss``, and

    - ``val/accuracy``: share of pairs whose chosen response scores higher; a tie counts half.
    - ``val/longer_wins``: the accuracy of preferring the longer response, the baseline to beat; a tie counts half.
    - ``val/accuracy_length_balanced``: the mean of two accuracies, that on pairs whose chosen response is the longer
      one and that on pairs where it is the shorter one. A model that only looks at the length gets 0.5. Pairs of equal
      lengths are left out; NaN where one of the two kinds does not occur.
    - ``val/calibration_error``: expected calibration error of ``sigmoid(chosen - rejected)`` as the probability that
      the first response is preferred, each pair taken both ways round (one way round there would be no negatives), in
      10 bins.
    - ``val/brier``: the mean squared difference between ``sigmoid(chosen - rejected)`` and the probability that the
      chosen response is preferred: 1, or the row's ``preference`` (Brier 1950). 0.25 is what 0.5 for all would give.
    - ``val/margin``, ``val/reward_mean``, ``val/reward_std``: the scores' mean difference, mean and deviation.

    Args:
        model: folder of the model to start from: usually the SFT policy.
        head: ``fresh`` draws a new score head; ``trained`` continues a reward model, an error where there is none.
        label_smoothing: the probability that a label is the wrong way round, below 0.5.
        centring: weight of the squared sum of a pair's scores, which keeps the scores around 0.
        normalise: how the exported model's scores are normalised, over the chosen held-out responses (those of the
            last epoch of training where none are held out): ``mean`` makes their mean 0 and keeps differences log-odds;
            ``mean_and_std`` also makes their deviation 1; ``none`` leaves the scores as they are.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the fresh head, and of adapters.
    """

    data_view = View("pairs", soft=True)

    def __init__(
        self,
        model: str,
        head: HeadKind = "fresh",
        label_smoothing: LabelSmoothing = 0.0,
        centring: NonNegativeFloat = 0.0,
        normalise: Normalisation = "mean",
        optimizer: AdamWOptions = AdamWOptions(),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(model, optimizer=optimizer, lora=lora, network=network, seed=seed)
        check_choice("model.head", head, HeadKind)
        check_choice("model.normalise", normalise, Normalisation)
        self.head = head
        self.label_smoothing = label_smoothing
        self.centring = centring
        self.normalise = normalise
        self.reward_model: ScalarModel | None = None
        # Of the chosen scores of the current epoch: how many, their sum and the sum of their squares.
        self._trained_on = torch.zeros(3, dtype=torch.float64)
        self._to_normalise = False
        self.calibration = BinaryCalibrationError(n_bins=10, norm="l1")

    def configure_model(self) -> None:
        """Loads (and shards) the model. Every stage calls this; only the first call does the work."""
        if self.reward_model is None:
            trainer = self._trainer
            # A fresh head is right for training, or where a checkpoint fills it next (as it may without a Trainer).
            # Measured as it is, it would give noise.
            filled = trainer is None or trainer.training or trainer.ckpt_path is not None
            fresh = self.head == "fresh" and filled
            self.reward_model = self.factory().scalar(self.model_folder, fresh_head=fresh)
            if trainer is not None and trainer.training:
                self.reward_model.set_normalisation(0.0, 1.0)
                self._to_normalise = self.normalise != "none"

    def networks(self) -> dict[str, Any]:
        """See `RLHFModule.networks`."""
        return {} if self.reward_model is None else {"reward_model": self.reward_model}

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the pairs' losses."""
        chosen, rejected = self.scores(batch)
        losses = self._losses(chosen, rejected, batch)
        assert self.reward_model is not None
        total, counted = batch.weights.sum(), batch.weights > 0
        loss = weighted_sum(losses, batch.weights)
        loss = loss + router_loss(self.reward_model, counted.repeat(2), total, self.step.totals)
        self.step.count(total, loss, tokens=batch.chosen.lengths.sum() + batch.rejected.lengths.sum())
        self.step.totals.add("train/loss", losses, batch.weights)
        self.step.totals.add("train/accuracy", wins(chosen, rejected), counted & decided(batch))
        self.step.totals.add("train/margin", chosen - rejected, counted)
        # Scores of an earlier epoch belong to another model, so the sums start anew with each epoch. Lightning does not
        # call `on_train_epoch_start` where a run resumes at the end of an epoch, so the first batch starts them.
        before = self._trained_on.to(chosen.device) if batch_idx > 0 else 0.0
        self._trained_on = before + _moments(chosen, counted)
        return loss

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The scores of the chosen and of the rejected responses, ``[B]`` each, read at their last tokens."""
        assert self.reward_model is not None
        rows = as_rows(batch)
        scores = at_last_token(self.reward_model(rows.tokens, rows.lengths), rows.lengths)
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def _losses(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        margins, smoothing = batch.margins, self.label_smoothing
        return bradley_terry_loss(chosen, rejected, margins, smoothing, self.centring, batch.preferences)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds the sums behind the metrics that the class's docstring lists."""
        totals = self.held_out_totals
        chosen, rejected = self.scores(batch)
        counted = batch.weights > 0
        sure = counted & decided(batch)
        won = wins(chosen, rejected)
        lengths = [side.response_mask.sum(dim=1) for side in (batch.chosen, batch.rejected)]
        totals.add("loss", self._losses(chosen, rejected, batch), batch.weights)
        totals.add("accuracy", won, sure)
        totals.add("accuracy_longer", won, sure & (lengths[0] > lengths[1]))
        totals.add("accuracy_shorter", won, sure & (lengths[0] < lengths[1]))
        totals.add("longer_wins", wins(lengths[0], lengths[1]), sure)
        totals.add("margin", chosen - rejected, counted)
        both, twice = torch.cat([chosen, rejected]), counted.repeat(2)
        totals.add("reward_mean", both, twice)
        totals.add("reward_square", both.double().square(), twice)
        probabilities = torch.sigmoid(chosen - rejected).float()
        truth = torch.ones_like(probabilities) if batch.preferences is None else batch.preferences
        totals.add("brier", (probabilities - truth).square(), counted)
        probabilities = probabilities[sure]
        self.calibration.update(
            torch.cat([probabilities, 1.0 - probabilities]),
            torch.cat([torch.ones_like(probabilities), torch.zeros_like(probabilities)]).long(),
        )

    def held_out_metrics(self, totals: Totals) -> dict[str, float]:
        """Also computes the metrics that need several sums: length-balanced accuracy, deviation, calibration error."""
        means = totals.means()
        if not means:
            return means
        longer, shorter = means.pop("accuracy_longer"), means.pop("accuracy_shorter")
        means["accuracy_length_balanced"] = 0.5 * (longer + shorter)
        means["reward_std"] = math.sqrt(max(0.0, means.pop("reward_square") - means["reward_mean"] ** 2))
        means["calibration_error"] = float(self.calibration.compute())
        self.calibration.reset()
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the sums behind the normalisation, added up over all processes; every process calls this."""
        super().on_save_checkpoint(checkpoint)
        sums = all_reduce_sum(self._trained_on.to(self.trainer.strategy.root_device))
        checkpoint["reward_model"] = {"trained_on": sums.tolist()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives the saved sums to the first process; the others start from zero."""
        super().on_load_checkpoint(checkpoint)
        sums = torch.tensor(self.own_part(checkpoint, "reward_model")["trained_on"], dtype=torch.float64)
        self._trained_on = sums if rank() == 0 else torch.zeros_like(sums)

    def on_train_end(self) -> None:
        """Scores the chosen responses and stores the scores' mean (and deviation) with the model."""
        self._set_normalisation()

    def _set_normalisation(self) -> None:
        if not self._to_normalise:
            return
        self._to_normalise = False
        assert self.reward_model is not None
        device = self.trainer.strategy.root_device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()  # a run resumed after its end has none yet
        for batch in self.trainer.val_dataloaders or ():
            batch = self.trainer.strategy.batch_to_device(batch)
            with torch.no_grad():
                sums += _moments(self.scores(batch)[0], batch.weights > 0)
        held_out = all_reduce_sum(sums)
        number, total, squares = (held_out if held_out[0] > 0 else all_reduce_sum(self._trained_on.to(device))).tolist()
        mean = total / number if number else math.nan
        deviation = math.sqrt(max(0.0, squares / number - mean**2)) if number else math.nan
        # Equal scores have no deviation to divide by.
        spread = deviation if self.normalise == "mean_and_std" and deviation > 0 else 1.0
        self.reward_model.set_normalisation(mean, spread)

    def export(self, folder: str | Path, card: str | None = None) -> None:
        """See `RLHFModule.export`; an ``AutoModelForSequenceClassification`` folder."""
        self._set_normalisation()  # of a run resumed after its end, where `on_train_end` is not called
        super().export(folder, card)


def _moments(scores: Tensor, counted: Tensor) -> Tensor:
    """``[3]`` float64: how many scores count, their sum, and the sum of their squares."""
    scores = torch.where(counted, scores.detach().double(), 0.0)
    return torch.stack([counted.sum().double(), scores.sum(), scores.square().sum()])
