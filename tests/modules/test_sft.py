"""SFT: its gradient against a float64 loss written out by hand, and what must not change it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from making import make
from small_data import SmallData, make_pairs, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.optimizer import AdamWOptions

# One step of plain gradient descent, in effect: with an epsilon far above the gradients, and its first step corrected
# for bias, AdamW moves every weight by -rate * gradient / eps.
DESCENT = {"optimizer": {"learning_rate": 1.0, "eps": 1e6}}
ALL = list(range(10))


def gradient(folder: Path, batches: list[list[int]], **options: object) -> dict[str, Tensor]:
    """The gradient that one optimizer step used, read off the movement of the weights; float64."""
    data = SmallData(folder, batches, extra=options.pop("extra", 0))
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    after = train(make(SFTModule, str(folder), **DESCENT), data, precision="64-true", **options)
    return {name: (value - after[f"model.{name}"]) * 1e6 for name, value in before.items()}


@pytest.fixture(scope="module")
def by_hand(tiny_policy_dir: Path) -> dict[str, Tensor]:
    """Row by row, without padding: the weighted mean of -log p over all response tokens of all rows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for pair in (make_pairs(24)[i] for i in ALL):
        logits = model(torch.tensor([pair.prompt + pair.chosen])).logits[0]
        for offset, token in enumerate(pair.chosen):
            scores = logits[len(pair.prompt) + offset - 1]
            total = total + pair.weight * (scores.logsumexp(0) - scores[token])
        count += pair.weight * len(pair.chosen)
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # Llama's norms compute in float32 whatever the weights are; without that it would agree to 1e-12.
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=3e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_is_that_of_the_loss_by_hand(tiny_policy_dir: Path, by_hand: dict[str, Tensor]) -> None:
    assert_same(gradient(tiny_policy_dir, [ALL]), by_hand)


@pytest.mark.parametrize(
    "batches", [[[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]], [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9]]], ids=["full", "smaller group"]
)
def test_gradient_does_not_depend_on_the_split(
    tiny_policy_dir: Path, by_hand: dict[str, Tensor], batches: list[list[int]]
) -> None:
    # Three to an accumulation; two batches are a smaller last group, which Lightning divides by three all the same.
    assert_same(gradient(tiny_policy_dir, batches, accumulate_grad_batches=3), by_hand)


def test_gradient_does_not_depend_on_padding(tiny_policy_dir: Path, by_hand: dict[str, Tensor]) -> None:
    assert_same(gradient(tiny_policy_dir, [ALL], extra=5), by_hand)


def test_gradient_does_not_depend_on_row_order(tiny_policy_dir: Path, by_hand: dict[str, Tensor]) -> None:
    assert_same(gradient(tiny_policy_dir, [ALL[::-1]]), by_hand)


def test_held_out_loss_and_perplexity_are_of_the_tokens(tiny_policy_dir: Path) -> None:
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=1e-9))
    train(module, SmallData(tiny_policy_dir, [[0]], held_out=True))
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    total = count = 0.0
    for pair in make_pairs(24)[:13]:
        ids = torch.tensor([pair.prompt + pair.chosen])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(pair.chosen) :]
        total -= pair.weight * log_probs.sum().item()
        count += pair.weight * len(pair.chosen)
    metrics = module.trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(total / count, rel=1e-4)
    assert float(metrics["val/perplexity"]) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_training_lowers_the_loss(tiny_policy_dir: Path) -> None:
    losses = []
    for rate in (1e-9, 0.01):
        module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=rate))
        train(module, SmallData(tiny_policy_dir, [list(range(13))] * 10, held_out=True))
        losses.append(float(module.trainer.callback_metrics["val/loss"]))
    assert losses[1] < 0.5 * losses[0]
