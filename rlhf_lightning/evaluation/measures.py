"""Measures one policy: KL to a reference, perplexity on held-out text, repetition.

Shapes: ``B`` rows, ``S`` prompt + response tokens, ``T`` response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlhf_lightning.algorithms.kl import kl_estimate
from rlhf_lightning.batches import DemonstrationBatch, Rollout, length_mask
from rlhf_lightning.models.policy import Policy


@torch.no_grad()
def kl_to_reference(
    policy: Policy, reference: Policy, rollout: Rollout, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Two estimates of KL(policy || reference) for each of the policy's own responses, in nats.

    For each token, ``d = log policy - log reference``. k1 sums d and k3 sums ``exp(-d) - 1 + d`` over the response, EOS
    included (Schulman 2020, "Approximating KL divergence"). If the tokens were sampled from the policy at this
    temperature, the expectation of both is the KL of whole responses. k3 varies less and is never negative.

    Args:
        policy, reference: models on the rollout's device, with the same vocabulary.
        rollout: B responses sampled from ``policy``.
        temperature: the sampling temperature; both models' logits are divided by it. Greedy responses (0) are scored
            at 1.

    Returns: k1 and k3, ``[B]`` float64 each, on the CPU.
    """
    arguments = (rollout.tokens, rollout.lengths, rollout.prompt_lengths, temperature or 1.0)
    own, other = policy(*arguments).log_probs.double(), reference(*arguments).log_probs.double()
    mask = length_mask(rollout.response_lengths, own.shape[1])
    estimates = (kl_estimate(own, other, name).where(mask, 0.0).sum(dim=1).cpu() for name in ("k1", "k3"))
    first, third = estimates
    return first, third


@torch.no_grad()
def perplexity(policy: Policy, batches: Iterable[DemonstrationBatch]) -> float:
    """``exp`` of the mean negative log-likelihood of all response tokens, EOS included, given the tokens before them.

    The mean is over tokens, not over rows or batches, so batching does not change it. Rows of weight 0 do not count.

    Raises:
        ValueError: no batch has a response token.
    """
    total, count = 0.0, 0
    for batch in batches:
        log_probs = policy(batch.tokens, batch.lengths, batch.prompt_lengths).log_probs.double()
        mask = batch.response_mask & (batch.weights > 0)[:, None]
        total -= float(log_probs.where(mask, 0.0).sum())
        count += int(mask.sum())
    if count == 0:
        raise ValueError("perplexity: no response tokens to measure it on")
    # A policy that gives a token probability 0 has infinite perplexity; math.exp would raise from 709 nats on.
    return math.exp(total / count) if total / count < 700 else math.inf


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of a response's n-grams that have occurred in it before: 0 for no repetition, near 1 for a loop.

    ``1 - distinct n-grams / n-grams`` (Li et al. 2016, arXiv 1510.03055, count distinct ones); 0 if the response is too
    short to repeat one. Policies that exploit a reward model often fall into loops long before other numbers show it.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of ``[N]`` values and its standard error (0 for a single value)."""
    numbers = values.double()
    error = float(numbers.std()) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    return float(numbers.mean()), error
