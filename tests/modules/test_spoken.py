"""Responses of several turns: only the assistant's own tokens are learnt from, whatever the method and the batches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make
from small_data import SmallData, make_pairs, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.batches import DemonstrationBatch, LabelledBatch, PreferenceBatch, length_mask
from rlhf_lightning.evaluation.measures import perplexity
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule, mismatched
from rlhf_lightning.modules.orpo import ORPOModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.simpo import SimPOModule
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import as_rows

DESCENT = {"optimizer": {"learning_rate": 1.0, "eps": 1e6}}  # see test_sft.py
ALL = list(range(10))


def spoken(offset: int) -> bool:
    """Whether the assistant says a response's token, by its place: the first, and two of every three."""
    return offset % 3 != 1


def with_turns(batch: Any) -> Any:
    if isinstance(batch, PreferenceBatch):
        return replace(batch, chosen=with_turns(batch.chosen), rejected=with_turns(batch.rejected))
    if isinstance(batch, LabelledBatch):
        return replace(batch, responses=with_turns(batch.responses))
    steps = batch.lengths - batch.prompt_lengths
    said = torch.tensor([spoken(offset) for offset in range(int(steps.max()))])
    return replace(batch, spoken=length_mask(steps, len(said)) & said)


class Turns(SmallData):
    def collate(self, numbers: list[int]) -> Any:
        return with_turns(super().collate(numbers))


def said(model: Any, prompt: list[int], response: list[int]) -> list[Tensor]:
    """The log-probs of the assistant's tokens, the plainest way."""
    log_probs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return [log_probs[len(prompt) + t - 1, token] for t, token in enumerate(response) if spoken(t)]


@pytest.mark.parametrize("batches", [[ALL], [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]]], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("extra", [0, 3], ids=["", "padded"])
def test_sft_learns_what_the_assistant_says(tiny_policy_dir: Path, batches: list[list[int]], extra: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for pair in (make_pairs(24)[i] for i in ALL):
        terms = said(model, pair.prompt, pair.chosen)
        total, count = total - pair.weight * torch.stack(terms).sum(), count + pair.weight * len(terms)
    (total / count).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = make(SFTModule, str(tiny_policy_dir), **DESCENT)
    data = Turns(tiny_policy_dir, batches, extra)
    after = train(module, data, precision="64-true", accumulate_grad_batches=len(batches))
    for name, parameter in model.named_parameters():
        got = (before[name] - after[f"model.{name}"]) * 1e6
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=3e-7, msg=lambda m, n=name: f"{n}: {m}")
    metrics = module.trainer.logged_metrics
    assert float(metrics["train/loss"]) == pytest.approx(float(total.detach()) / count, rel=1e-5)


def test_a_token_that_is_not_the_assistants_has_no_gradient(tiny_policy_dir: Path) -> None:
    policy = Policy(AutoModelForCausalLM.from_pretrained(tiny_policy_dir))
    batch = DemonstrationBatch(
        torch.tensor([[5, 6, 7, 8, 9]]),
        torch.tensor([5]),
        torch.tensor([2]),
        torch.ones(1),
        torch.tensor([[1, 1, 0]]) > 0,
    )

    def gradients(last: int) -> list[Tensor]:
        policy.zero_grad()
        tokens = batch.tokens.clone()
        tokens[0, -1] = last
        policy.cross_entropy(tokens, batch.lengths, batch.prompt_lengths, batch.response_weights)[0].backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    one, other = gradients(9), gradients(30)
    embeddings = policy.model.get_input_embeddings().weight.shape
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert any(bool(g.any()) for g in one)
    of_inputs = next(g for g, p in zip(one, policy.parameters(), strict=True) if p.shape == embeddings)
    assert not of_inputs[9].any()


@pytest.mark.parametrize(
    ("cls", "options", "labelled"),
    [
        (DPOModule, {}, False),
        (DPOModule, {"loss_type": "ipo"}, False),
        (KTOModule, {}, False),
        (KTOModule, {}, True),
        (ORPOModule, {}, False),
        (SimPOModule, {}, False),
    ],
)
def test_preferences_are_of_what_the_assistant_says(
    tiny_policy_dir: Path, other_policy_dir: Path, cls: type, options: dict[str, Any], labelled: bool
) -> None:
    referenced = {"reference": str(other_policy_dir)} if cls in (DPOModule, KTOModule) else {}
    module = cls(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=1e-12), **options, **referenced)
    train(module, Turns(tiny_policy_dir, [[2]], labelled=labelled), precision="64-true")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float64)
    pair = make_pairs(24)[2]
    expected = torch.stack(said(model, pair.prompt, pair.chosen))
    metrics = module.trainer.logged_metrics
    chosen = float(metrics["logps/rejected" if labelled and "logps/chosen" not in metrics else "logps/chosen"])
    assert chosen == pytest.approx(float(expected.sum()), rel=1e-5)
    if cls is SimPOModule:
        assert float(metrics["rewards/chosen"]) == pytest.approx(2.0 * float(expected.mean()), rel=1e-5)
    if cls is DPOModule:
        reference = AutoModelForCausalLM.from_pretrained(other_policy_dir, dtype=torch.float64)
        margins = [
            float(
                torch.stack(said(model, pair.prompt, text)).sum()
                - torch.stack(said(reference, pair.prompt, text)).sum()
            )
            for text in (pair.chosen, pair.rejected)
        ]
        assert float(metrics["train/margin"]) == pytest.approx(0.1 * (margins[0] - margins[1]), rel=1e-4)


def test_a_response_keeps_its_turns_where_it_meets_another_prompt() -> None:
    def one(tokens: list[int], mask: list[int]) -> DemonstrationBatch:
        return DemonstrationBatch(
            torch.tensor([tokens, tokens[::-1]]),
            torch.tensor([len(tokens)] * 2),
            torch.tensor([1, 2]),
            torch.ones(2),
            torch.tensor([mask, [*mask[:-1][::-1], 0]]) > 0,
        )

    chosen, rejected = one([1, 2, 3, 4], [1, 0, 1]), one([5, 6, 7], [1, 1])
    rejected = replace(rejected, lengths=torch.tensor([3, 3]))
    rows, _ = mismatched(as_rows(PreferenceBatch(chosen, rejected, torch.zeros(2), torch.ones(2))), torch.ones(2))
    # Row 0 takes the second row's response of two tokens, row 1 the first row's of three.
    assert rows.response_mask.tolist()[:2] == [[False, True, False], [True, False, True]]


def test_perplexity_and_the_cut_of_a_batch_keep_to_the_turns(tiny_policy_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    data = Turns(tiny_policy_dir, [ALL])
    data.trainer = type("T", (), {"lightning_module": SFTModule(str(tiny_policy_dir))})
    batch = data.collate(ALL)
    pairs = make_pairs(24)
    with torch.no_grad():
        losses = [-float(x) for i in ALL for x in said(model, pairs[i].prompt, pairs[i].chosen)]
    policy = Policy(model)
    parts = [batch.take(torch.tensor([i])) for i in ALL]
    wanted = math.exp(sum(losses) / len(losses))
    assert perplexity(policy, [batch]) == pytest.approx(wanted, rel=1e-4)
    assert perplexity(policy, parts) == pytest.approx(wanted, rel=1e-4)
    assert batch.to("cpu").spoken is not None
