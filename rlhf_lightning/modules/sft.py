"""Supervised fine-tuning: maximise the likelihood of the demonstrated responses.

Shapes: ``B`` rows of this process, ``T`` response tokens.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, PromptBatch, Rollout, View
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.options import NonNegativeInt
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.balancing import router_loss
from rlhf_lightning.training.last_checkpoint import naming_checkpoint
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import Sampler, SamplingOptions, answers
from rlhf_lightning.training.totals import Totals


class SFTModule(RLHFModule):
    """Supervised fine-tuning on prompts and chosen responses; only what the assistant says carries loss.

    The loss, in nats, is the mean over all its tokens of an optimizer step (each weighted by its row's weight),
    whatever the number of micro-batches and processes. Logs ``train/loss``; held out ``val/loss`` and
    ``val/perplexity``.

    Args:
        model: folder (or hub id) of the model to train.
        sampling: how ``predict`` and the sample tables draw responses; the training draws none.
        engine: what answers there; None takes this library's own decode loop, or transformers' generation where that
            cannot run the model, see docs/rollout.md.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the sampling, and of adapters.
    """

    data_view = View("demonstrations")
    sampler: Sampler

    def __init__(
        self,
        model: str,
        sampling: SamplingOptions = SamplingOptions(),
        engine: RolloutEngine | None = None,
        optimizer: AdamWOptions = AdamWOptions(),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        sampler = Sampler(sampling, engine, seed)
        super().__init__(model, optimizer=optimizer, lora=lora, network=network, seed=seed, sampler=sampler)
        self.policy: Policy | None = None

    def configure_model(self) -> None:
        """Loads (and shards) the policy. Every stage calls this; only the first call does the work."""
        if self.policy is None:
            self.policy = self.factory().policy(self.model_folder)

    def networks(self) -> dict[str, Any]:
        """See `RLHFModule.networks`."""
        return {} if self.policy is None else {"policy": self.policy}

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the tokens' negative log-likelihoods."""
        assert self.policy is not None
        mask, weights = batch.response_mask, batch.response_weights
        # The weights are known before the forward pass, so the head can compute its gradients in that pass.
        loss, log_probs = self.policy.cross_entropy(batch.tokens, batch.lengths, batch.prompt_lengths, weights)
        loss = loss + router_loss(self.policy, batch.weights > 0, weights.sum(), self.step.totals)
        self.step.count(weights.sum(), loss, tokens=batch.lengths.sum())
        self.step.totals.add("train/loss", -log_probs, weights)
        self.step.totals.add("train/response_length", mask.sum(dim=1), batch.weights > 0)
        return loss

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """The loss a token, and the response length."""
        assert self.policy is not None
        mask, weights = batch.response_mask, batch.response_weights
        log_probs = self.policy(batch.tokens, batch.lengths, batch.prompt_lengths).log_probs
        self.held_out_totals.add("loss", -log_probs, weights)
        self.held_out_totals.add("response_length", mask.sum(dim=1), batch.weights > 0)

    def held_out_metrics(self, totals: Totals) -> dict[str, float]:
        """Perplexity is exp of the mean loss: it cannot be averaged itself."""
        means = totals.means()
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))} if "loss" in means else means

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; see `training.sampler.Sampler`."""
        with naming_checkpoint(self._trainer):
            return self.sampler(self, prompts, iteration, **overrides)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        return answers(batch, self.generate(batch))
