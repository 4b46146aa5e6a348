"""The base of the methods that learn from people's judgements alone: the models, a step over pairs, the metrics.

Shapes: ``B`` pairs of this process, ``T`` response tokens; see `training.pairs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from rlhf_lightning.batches import PreferenceBatch, PromptBatch, Rollout, View
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
        """Load (and shard) the policy and its reference. Every stage calls this; only the first call does the work."""
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
        experience = self.experience(batch)
        pairs = self.loss(response_log_probs(self.policy, experience.rows), experience)
        pairs.add_metrics(self.step.totals, batch.weights, "train/", "/")
        total, lengths = batch.weights.sum(), experience.rows.lengths
        counted = (batch.weights > 0).repeat(len(lengths) // len(batch))
        loss = weighted_sum(pairs.losses, batch.weights)
        loss = loss + router_loss(self.policy, counted, total, self.step.totals)
        self.step.count(total, loss, tokens=lengths.sum())
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, accuracy and margin of the rewards, and the rewards and log-probs themselves."""
        assert self.policy is not None
        experience = self.experience(batch)
        pairs = self.loss(response_log_probs(self.policy, experience.rows), experience)
        pairs.add_metrics(self.held_out_totals, batch.weights, "", "_")

    def on_validation_start(self) -> None:
        """Refuse to measure a model against itself; see `FrozenReference.refuse_itself`."""
        super().on_validation_start()
        if self.frozen is not None:
            self.frozen.refuse_itself(self.trainer, self.model_folder)

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        super().on_test_start()
        self.on_validation_start()

    # The policy's answers

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; see `training.sampler.Sampler`."""
        with naming_checkpoint(self._trainer):
            return self.sampler(self, prompts, iteration, **overrides)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        return answers(batch, self.generate(batch))
