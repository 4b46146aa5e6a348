"""What the methods that learn from judgements alone share: the models, a step over pairs, and the metrics.

Shapes: ``B`` pairs of this process, ``T`` response tokens; see `training.pairs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.batches import PreferenceBatch, PromptBatch, Rollout, View
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.policy import Policy, Reference
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.balancing import router_loss
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import PairLoss, RowScores, as_rows, score_rows, weighted_sum
from rlhf_lightning.training.sampler import Sampler, SamplingOptions, answers


class PreferenceModule(RLHFModule, ABC):
    """The base of the methods without sampling and without a reward model; a method says what its `loss` is.

    Logs ``train/loss``, ``train/accuracy``, ``train/margin``, ``rewards/chosen``, ``rewards/rejected``,
    ``logps/chosen`` and ``logps/rejected``; held out ``val/loss``, ``val/accuracy``, ``val/margin`` and so on. The loss
    is the mean over the pairs of an optimizer step, each weighted by its weight.

    Args:
        model: folder of the policy to train.
        reference: folder of the frozen model that a `referenced` method is held near; None takes ``model`` as it is at
            the start.
        sampling: how ``predict`` and the sample tables draw responses; the training draws none.
        engine: what answers there.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of everything that is drawn.
    """

    data_view = View("pairs")
    referenced = False  # whether the method is held near a frozen reference
    reference: Reference | None

    def __init__(
        self,
        model: str,
        *,
        reference: str | None = None,
        sampling: SamplingOptions,
        engine: RolloutEngine | None,
        optimizer: AdamWOptions,
        lora: LoRAOptions,
        network: NetworkOptions,
        seed: int,
    ) -> None:
        super().__init__(model, optimizer=optimizer, lora=lora, network=network, seed=seed)
        self.reference_folder = reference
        self.sampler = Sampler(sampling, engine, seed)
        self.policy: Policy | None = None
        if self.referenced:
            self.keep_frozen("reference", None)

    def setup(self, stage: str) -> None:
        """See `RLHFModule.setup`."""
        super().setup(stage)
        self.sampler.forget()  # a checkpoint may be loaded next

    def longest_sequence(self) -> int:
        """See `RLHFModule.longest_sequence`; with what may be sampled."""
        return self.sampler.longest(self.datamodule, super().longest_sequence())

    def configure_model(self) -> None:
        """Load (and shard) the policy, and its reference, which shares nothing with it; only the first call counts."""
        if self.policy is not None:
            return
        factory = self.factory()
        factory.check_reference(self.reference_folder, self.model_folder)
        self.policy = factory.policy(self.model_folder)
        if self.referenced:
            reference = factory.reference(self.reference_folder, self.policy, self.model_folder)
            self.keep_frozen("reference", reference)

    def networks(self) -> dict[str, Any]:
        """See `RLHFModule.networks`."""
        return {} if self.policy is None else {"policy": self.policy}

    # A step

    @abstractmethod
    def loss(self, batch: PreferenceBatch) -> PairLoss:
        """Losses, rewards and log-probs of the pairs."""

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the pairs' losses."""
        pairs = self.loss(batch)
        pairs.add_metrics(self.step.totals, batch.weights, "train/", "/")
        loss = weighted_sum(pairs.losses, batch.weights)
        return self.counted(loss, batch.weights, batch.chosen.lengths.sum() + batch.rejected.lengths.sum(), sides=2)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, accuracy and margin of the rewards, and the rewards and log-probs themselves."""
        self.loss(batch).add_metrics(self.held_out_totals, batch.weights, "", "_")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """As `validation_step`, logged as ``test/...``."""
        self.validation_step(batch, batch_idx)

    def counted(self, loss: Tensor, weights: Tensor, tokens: Tensor, sides: int) -> Tensor:
        """The summed loss of rows with weights ``[B]``, the routers' with it, counted into the optimizer step.

        Args:
            loss: scalar.
            weights: ``[B]``.
            tokens: real tokens processed.
            sides: rows that each weight has in the pass.
        """
        assert self.policy is not None
        total, rows = weights.sum(), (weights > 0).repeat(sides)
        loss = loss + router_loss(self.policy, rows, total, self.step.totals)
        self.step.count(total, loss, tokens=tokens)
        return loss

    def score_pairs(self, batch: PreferenceBatch) -> RowScores:
        """Both responses of every pair under the policy, in one pass."""
        assert self.policy is not None
        return score_rows(self.policy, as_rows(batch))

    # Held-out pairs

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
        trainer, given = self.trainer, self.reference_folder
        if not self.referenced or trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            return
        same = given is None or Path(given).expanduser().resolve() == Path(self.model_folder).expanduser().resolve()
        if same and trainer.ckpt_path is None and trainer.global_step == 0:
            raise InputError(
                f"model.reference: {given or self.model_folder} is the model that is measured too, and against itself "
                "all rewards and margins are 0: give the trained model's folder as model.model and the one that it "
                "started from as model.reference, or a checkpoint by --ckpt_path"
            )

    # The policy's answers

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; see `training.sampler.Sampler`."""
        with self.naming_checkpoint():
            return self.sampler(self, prompts, iteration, **overrides)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        return answers(batch, self.generate(batch))
