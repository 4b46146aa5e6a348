"""Supervised fine-tuning: maximise the likelihood of the demonstrated responses.

Shapes: ``B`` rows of this process, ``T`` response tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, View
from rlhf_lightning.modules.balancing import router_loss
from rlhf_lightning.modules.policy import PolicyModule
from rlhf_lightning.modules.totals import Totals


class SFTModule(PolicyModule):
    """Supervised fine-tuning on prompts and chosen responses; only what the assistant says carries loss.

    The loss, in nats, is the mean over all its tokens of an optimizer step (each weighted by its row's weight),
    whatever the number of micro-batches and processes. Logs ``train/loss``; held out ``val/loss`` and
    ``val/perplexity``.
    """

    data_view = View("demonstrations")

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the tokens' negative log-likelihoods."""
        assert self.policy is not None
        mask, weights = batch.response_mask, batch.response_weights
        # Known before the forward pass, so the head can make its gradients in it.
        loss, log_probs = self.policy.cross_entropy(batch.tokens, batch.lengths, batch.prompt_lengths, weights)
        loss = loss + router_loss(self.policy, batch.weights > 0, weights.sum(), self.step_totals)
        self.count(weights.sum(), loss, tokens=batch.lengths.sum())
        self.step_totals.add("train/loss", -log_probs, weights)
        self.step_totals.add("train/response_length", mask.sum(dim=1), batch.weights > 0)
        return loss

    def measure(self, batch: DemonstrationBatch, totals: Totals) -> None:
        """``loss`` a token, and the response length."""
        assert self.policy is not None
        mask, weights = batch.response_mask, batch.response_weights
        log_probs = self.policy(batch.tokens, batch.lengths, batch.prompt_lengths).log_probs
        totals.add("loss", -log_probs, weights)
        totals.add("response_length", mask.sum(dim=1), batch.weights > 0)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity is exp of the mean loss: it cannot be averaged itself."""
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))} if "loss" in means else means
