"""What an iteration of sampling and learning logs, under the names that users of other trainers know.

``objective/*`` are means over responses (KL and entropy summed over a response's tokens, in nats), ``policy/*`` and
``val/*`` means over the tokens and updates of the iteration. All means are over all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.algorithms.kl import Estimator, kl_estimate
from rlhf_lightning.algorithms.masked import masked_variance
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_max, all_reduce_sum
from rlhf_lightning.modules.sampling import ResponseScores
from rlhf_lightning.modules.totals import Totals


def count_rollout(
    totals: Totals, rollout: Rollout, scores: Tensor, now: ResponseScores, kl_coef: float, kl_estimator: Estimator
) -> None:
    """Add what is known of a rollout before its update: scores, KL, entropy, lengths.

    ``objective/kl`` is k1, ``objective/kl_k3`` k3; ``objective/non_score_reward`` is ``-kl_coef`` times the estimate
    that is charged; ``objective/entropy`` the summed -log p of the sampled tokens (an unbiased estimate of the
    entropy); ``rollout/entropy`` the mean entropy of the distributions that tokens were drawn from, where the engine
    tells it; ``rollout/logprob_gap`` the mean absolute difference between the log-probs of sampling and those of the
    training pass, where there was one: top-k, top-p or an inexact engine would show up in it.
    """
    present = rollout.prompts.weights > 0
    mask = rollout.response_mask & present[:, None]

    def per_response(x: Tensor) -> Tensor:
        return torch.where(mask, x.double(), 0.0).sum(dim=1)

    def kl(estimator: Estimator) -> Tensor:
        return per_response(kl_estimate(now.log_probs, now.reference_log_probs, estimator))

    totals.add("objective/kl", kl("k1"), present)
    totals.add("objective/kl_k3", kl("k3"), present)
    totals.add("objective/entropy", per_response(-now.log_probs), present)
    totals.add("objective/scores", scores, present)
    penalty = kl_coef * kl(kl_estimator)
    totals.add("objective/non_score_reward", -penalty, present)
    totals.add("objective/rlhf_reward", scores.double() - penalty, present)
    totals.add("rollout/length", rollout.response_lengths, present)
    totals.add("rollout/truncated", rollout.truncated, present)
    totals.add("val/num_eos_tokens", ~rollout.truncated, present)
    if rollout.entropy is not None:
        totals.add("rollout/entropy", rollout.entropy, mask)
    if now.log_probs is not rollout.log_probs:
        totals.add("rollout/logprob_gap", (rollout.log_probs - now.log_probs).abs(), mask)


def iteration_metrics(totals: Totals, rollout: Rollout, scores: Tensor) -> dict[str, float]:
    """All of an iteration's metrics by name, the same on every process (which all must call it)."""
    metrics = totals.means()
    present = rollout.prompts.weights > 0
    rows = int(all_reduce_sum(present.sum()))
    metrics["val/num_eos_tokens"] *= rows  # a count, as its name says
    if "reward/skipped" in metrics:
        metrics["reward/skipped"] = totals.total("reward/skipped")
    metrics["rollout/tokens"] = metrics["rollout/length"] * rows
    metrics["objective/scores_std"] = masked_variance(scores, present, all_reduce_sum).sqrt().item()
    metrics["rollout/max_length"] = float(all_reduce_max(rollout.response_lengths.max()))
    if "val/ratio_squared" in metrics:
        metrics["val/ratio_var"] = metrics.pop("val/ratio_squared") - metrics["val/ratio"] ** 2
    return metrics
