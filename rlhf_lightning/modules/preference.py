"""The base of the methods that learn from people's judgements alone: the models, a step over pairs, the metrics.

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
from rlhf_lightning.training.frozen_reference import FrozenReference
from rlhf_lightning.training.last_checkpoint import naming_checkpoint
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import JudgedLoss, JudgedPairs, as_rows, response_log_probs, weighted_sum
from rlhf_lightning.training.sampler import Sampler, SamplingOptions, answers


class PreferenceModule(RLHFModule, ABC):
    """The base of the methods without sampling and without a reward model. A method writes its `loss`.

    Logs ``train/loss``, ``train/accuracy``, ``train/margin``, ``rewards/chosen``, ``rewards/rejected``,
    ``logps/chosen`` and ``logps/rejected``; held out ``val/loss``, ``val/accuracy``, ``val/margin`` and so on. The loss
    is the mean over the pairs of an optimizer step, each weighted by its weight.

    Args:
        model: folder of the policy to train.
        reference: the frozen model that the method is held near; None for a method without one.
        sampling: how ``predict`` and the sample tables draw responses; the training draws none.
        engine: what answers there.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of everything that is drawn.
    """

    data_view = View("pairs")
    sampler: Sampler

    def __init__(
        self,
        model: str,
        *,
        reference: FrozenReference | None = None,
        sampling: SamplingOptions,
        engine: RolloutEngine | None,
        optimizer: AdamWOptions,
        lora: LoRAOptions,
        network: NetworkOptions,
        seed: int,
    ) -> None:
        sampler = Sampler(sampling, engine, seed)
        super().__init__(model, optimizer=optimizer, lora=lora, network=network, seed=seed, sampler=sampler)
        self.frozen = reference
        self.policy: Policy | None = None

    def configure_model(self) -> None:
        """Loads (and shards) the policy and its reference. Every stage calls this; the first call does the work."""
        if self.policy is not None:
            return
        factory = self.factory()
        if self.frozen is not None:
            factory.check_reference(self.frozen.folder, self.model_folder)
        self.policy = factory.policy(self.model_folder)
        if self.frozen is not None:
            self.frozen.load(factory, self.policy, self.model_folder)

    @property
    def reference(self) -> Reference | None:
        """The frozen model; None before ``configure_model``, or where the method has none."""
        return None if self.frozen is None else self.frozen.model

    def networks(self) -> dict[str, Any]:
        """See `RLHFModule.networks`."""
        return {} if self.policy is None else {"policy": self.policy}

    # A step

    def experience(self, batch: PreferenceBatch) -> Any:
        """The batch's rows, and what stays fixed while the policy learns from them."""
        rows = as_rows(batch)
        return JudgedPairs(rows, None if self.frozen is None else self.frozen.log_probs(rows))

    @abstractmethod
    def loss(self, log_probs: Tensor, experience: Any) -> JudgedLoss:
        """The losses of the pairs: a pure function of their new log-probs and of what stays fixed.

        Args:
            log_probs: ``[2B]``, the responses' summed log-probs under the policy.
            experience: see `experience`.
        """

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the pairs' losses."""
        assert self.policy is not None
        judged, lengths = self.judge(batch)
        judged.add_to(self.step.totals, batch.weights, lambda name: name if "/" in name else f"train/{name}")
        total, counted = batch.weights.sum(), (batch.weights > 0).repeat(len(lengths) // len(batch))
        loss = weighted_sum(judged.losses, batch.weights)
        loss = loss + router_loss(self.policy, counted, total, self.step.totals)
        self.step.count(total, loss, tokens=lengths.sum())
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, accuracy and margin of the rewards, and the rewards and log-probs themselves."""
        judged, _ = self.judge(batch)
        judged.add_to(self.held_out_totals, batch.weights, lambda name: name.replace("/", "_"))

    def judge(self, batch: PreferenceBatch) -> tuple[JudgedLoss, Tensor]:
        """The loss of a batch by its rows' new log-probs, and the rows' lengths."""
        assert self.policy is not None
        experience = self.experience(batch)
        log_probs = response_log_probs(self.policy, experience.rows)
        return self.loss(log_probs, experience), experience.rows.lengths

    def on_validation_start(self) -> None:
        """Refuses to measure a model against itself."""
        super().on_validation_start()
        self._refuse_itself()

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        super().on_test_start()
        self._refuse_itself()

    def _refuse_itself(self) -> None:
        """Raises an InputError if an untrained policy would be measured against itself: every margin would be 0."""
        trainer, start = self.trainer, self.model_folder
        if self.frozen is None or trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            return
        folder = self.frozen.folder or start
        same = Path(folder).expanduser().resolve() == Path(start).expanduser().resolve()
        if same and trainer.ckpt_path is None and trainer.global_step == 0:
            raise InputError(
                f"model.reference: {folder} is the model that is measured too, and against itself all rewards and "
                "margins are 0: give the trained model's folder as model.model and the one that it started from as "
                "model.reference, or a checkpoint by --ckpt_path"
            )

    # The policy's answers

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; see `training.sampler.Sampler`."""
        with naming_checkpoint(self._trainer):
            return self.sampler(self, prompts, iteration, **overrides)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        return answers(batch, self.generate(batch))
