"""The metrics of an iteration of sampling and learning, under the names that users of other trainers know.

``objective/*`` are means over responses (KL and entropy summed over a response's tokens, in nats), ``policy/*`` and
``critic/*`` means over the tokens and updates of the iteration. All means are over all processes. docs/metrics.md has
every name with its formula and unit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf_lightning.algorithms.kl import Estimator, kl_estimate
from rlhf_lightning.algorithms.masked import masked_variance
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_max, all_reduce_sum
from rlhf_lightning.training.experience import ResponseScores
from rlhf_lightning.training.kl_control import KLController
from rlhf_lightning.training.totals import Totals


def count_rollout(totals: Totals, rollout: Rollout, scores: Tensor, old: ResponseScores, price: KLController) -> None:
    """Adds what is known of a rollout before its update: scores, KL, entropy, lengths.

    ``objective/kl`` is k1, ``objective/kl_k3`` k3; ``objective/non_score_reward`` is ``-price.coef`` times the estimate
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
        return per_response(kl_estimate(old.log_probs, old.reference_log_probs, estimator))

    totals.add("objective/kl", kl("k1"), present)
    totals.add("objective/kl_k3", kl("k3"), present)
    totals.add("objective/entropy", per_response(-old.log_probs), present)
    totals.add("objective/scores", scores, present)
    penalty = price.coef * kl(price.options.estimator)
    totals.add("objective/non_score_reward", -penalty, present)
    totals.add("objective/rlhf_reward", scores.double() - penalty, present)
    totals.add("rollout/length", rollout.response_lengths, present)
    totals.add("rollout/truncated", rollout.truncated, present)
    totals.add("rollout/num_eos_tokens", ~rollout.truncated, present)
    if rollout.entropy is not None:
        totals.add("rollout/entropy", rollout.entropy, mask)
    if old.log_probs is not rollout.log_probs:
        totals.add("rollout/logprob_gap", (rollout.log_probs - old.log_probs).abs(), mask)


class Phases:
    """How long the parts of an iteration take.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds that the block takes to the phase's."""
        began = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began


def iteration_metrics(
    totals: Totals, rollout: Rollout, scores: Tensor, seconds: Mapping[str, float]
) -> dict[str, float]:
    """All of an iteration's metrics by name, the same on every process (which all must call it) but for the times.

    Args:
        totals: what was counted.
        rollout: the responses.
        scores: ``[B]``.
        seconds: of the phases.
    """
    metrics = totals.means()
    present = rollout.prompts.weights > 0
    rows = int(all_reduce_sum(present.sum()))
    metrics["rollout/num_eos_tokens"] *= rows  # a count, as its name says
    if "reward/skipped" in metrics:
        metrics["reward/skipped"] = totals.total("reward/skipped")
    metrics["rollout/tokens_per_second"] = metrics["rollout/length"] * rows / seconds["rollout"]
    metrics |= {f"time/{phase}": taken for phase, taken in seconds.items()}
    metrics["objective/scores_std"] = masked_variance(scores, present, all_reduce_sum).sqrt().item()
    metrics["rollout/max_length"] = float(all_reduce_max(rollout.response_lengths.max()))
    if "policy/ratio_squared" in metrics:
        metrics["policy/ratio_var"] = metrics.pop("policy/ratio_squared") - metrics["policy/ratio"] ** 2
    return metrics


def held_out_metrics(totals: Totals, *, with_kl: bool) -> dict[str, float]:
    """All of a validation's metrics by name, the same on every process (which all must call it).

    Args:
        totals: what `count_rollout` and `Actors.measure_demonstrations` added.
        with_kl: whether the responses have a KL; greedy ones have none.
    """
    names = {"objective/scores": "scores", "rollout/length": "length", "rollout/truncated": "truncated"}
    if with_kl:
        names |= {"objective/kl": "kl", "objective/kl_k3": "kl_k3"}
    means = totals.means()
    metrics = {new: means[old] for old, new in names.items()}
    if "reward/skipped" in means:
        metrics["skipped"] = totals.total("reward/skipped")
    if "demonstrations/loss" in means:
        metrics["perplexity"] = math.exp(min(means["demonstrations/loss"], 700.0))
    return metrics
