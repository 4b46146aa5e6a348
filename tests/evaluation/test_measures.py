"""KL, perplexity and repetition against numbers from the stock model's logits and from hands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf_lightning.batches import DemonstrationBatch, PromptBatch, Rollout
from rlhf_lightning.evaluation.measures import kl_to_reference, mean_and_error, perplexity, repetition
from rlhf_lightning.models.policy import Policy


@pytest.fixture(scope="module")
def models(tiny_policy_dir: Path) -> tuple[Policy, Policy]:
    first = LlamaForCausalLM.from_pretrained(tiny_policy_dir)
    second = LlamaForCausalLM.from_pretrained(tiny_policy_dir)
    with torch.no_grad():
        second.lm_head.weight.mul_(0.8)
    return Policy(first).eval(), Policy(second).eval()


def stock_log_probs(policy: Policy, row: Tensor, prompt: int, temperature: float = 1.0) -> Tensor:
    """Log-probs of one unpadded row's response tokens, float64, from the model's plain logits."""
    with torch.no_grad():
        logits = policy.model(row[None]).logits[0].double() / temperature
    return logits.log_softmax(-1)[prompt - 1 : -1].gather(1, row[prompt:, None])[:, 0]


TOKENS = torch.tensor([[5, 6, 7, 8, 9, 1], [5, 6, 1, 0, 0, 0], [9, 8, 7, 6, 0, 0]])
LENGTHS, PROMPTS = torch.tensor([6, 3, 4]), torch.tensor([2, 2, 1])


def rollout() -> Rollout:
    rows = len(TOKENS)
    prompts = PromptBatch(TOKENS[:, :2], PROMPTS, torch.arange(rows), torch.ones(rows), [""] * rows, {})
    truncated = torch.tensor([False, False, True])
    return Rollout(prompts, TOKENS, LENGTHS, PROMPTS, torch.zeros(rows, 4), truncated, [""] * rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_sums_k1_and_k3_over_the_response(models: tuple[Policy, Policy], temperature: float) -> None:
    k1, k3 = kl_to_reference(*models, rollout(), temperature)
    for row in range(len(TOKENS)):
        own, other = (
            stock_log_probs(model, TOKENS[row, : LENGTHS[row]], int(PROMPTS[row]), temperature) for model in models
        )
        d = own - other
        assert float(k1[row]) == pytest.approx(float(d.sum()), abs=1e-4)
        assert float(k3[row]) == pytest.approx(float((torch.exp(-d) - 1 + d).sum()), abs=1e-4)
    assert k3.min() >= 0


def test_kl_of_a_policy_to_itself_is_zero(models: tuple[Policy, Policy]) -> None:
    k1, k3 = kl_to_reference(models[0], models[0], rollout())
    assert not k1.any() and not k3.any()


def test_perplexity_weighs_tokens_not_rows_and_ignores_batching(models: tuple[Policy, Policy]) -> None:
    policy = models[0]
    whole = DemonstrationBatch(TOKENS, LENGTHS, PROMPTS, torch.ones(3))
    rows = [
        DemonstrationBatch(TOKENS[i : i + 1], LENGTHS[i : i + 1], PROMPTS[i : i + 1], torch.ones(1)) for i in range(3)
    ]
    nll = torch.cat([-stock_log_probs(policy, TOKENS[i, : LENGTHS[i]], int(PROMPTS[i])) for i in range(3)])
    assert len(nll) == 4 + 1 + 3
    expected = math.exp(float(nll.mean()))
    assert perplexity(policy, [whole]) == pytest.approx(expected, rel=1e-4)
    assert perplexity(policy, rows) == pytest.approx(expected, rel=1e-4)
    filler = DemonstrationBatch(TOKENS, LENGTHS, PROMPTS, torch.tensor([1.0, 0.0, 0.0]))
    assert perplexity(policy, [filler]) == pytest.approx(math.exp(float(nll[:4].mean())), rel=1e-4)


def test_perplexity_of_nothing_is_refused(models: tuple[Policy, Policy]) -> None:
    with pytest.raises(ValueError, match="no response tokens"):
        perplexity(models[0], [])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([1, 2, 3, 4, 5, 6], 0.0), ([7] * 10, 6 / 7), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5), ([1, 2], 0.0), ([], 0.0)],
)
def test_repetition_by_hand(tokens: list[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected)


def test_mean_and_error_by_hand() -> None:
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.0))
    assert mean_and_error(torch.tensor([4.0])) == (4.0, 0.0)
