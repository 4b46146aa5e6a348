"""The gradients of a whole training step, of every parameter: the fused head and the native losses against plain
autograd on the logits of the stock model, row by row, unpadded, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gradient_cases import BATCHES, DPO, PPO, run, save_model
from processes import results_of
from small_data import Pair, make_pairs
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_lightning.models.head import Head
from rlhf_lightning.ops import extension

TASKS = ("sft", "dpo", "ppo")
# GPT-2 computes in float64 throughout; the norms of the others in float32, whatever the weights are.
FLOAT64 = {"gpt2": 1e-9, "llama": 2e-5, "cohere": 2e-5}
CASES = [(task, model) for task in TASKS for model in FLOAT64]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Of each model, and of another with other weights for the reference."""
    root = tmp_path_factory.mktemp("gradients")
    for name in FLOAT64:
        save_model(name, root / name, seed=3)
        save_model(name, root / f"{name}-reference", seed=4)
    return {name: (str(root / name), str(root / f"{name}-reference")) for name in FLOAT64}


def case(folders: dict[str, tuple[str, str]], task: str, model: str, **trainer: object) -> dict:
    return {
        "task": task,
        "model": folders[model][0],
        "reference": folders[model][1],
        # PPO's experience is float32 under every precision, and so are its losses.
        "trainer": {"precision": "32-true" if task == "ppo" else "64-true", "devices": 1, **trainer},
    }


# The oracle: losses written out from the papers over the logits of the stock model


def table(model: PreTrainedModel, tokens: list[int], start: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of every token at each place of the response that begins at ``start``: ``[T, V]``."""
    logits = model(torch.tensor([tokens])).logits[0, start - 1 : -1] / temperature
    return logits - logits.logsumexp(-1, keepdim=True)


def summed(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    rows = table(model, prompt + response, len(prompt))
    return sum(row[token] for row, token in zip(rows, response, strict=True))


def sft_loss(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    total = sum(-pair.weight * summed(model, pair.prompt, pair.chosen) for pair in pairs)
    return total / sum(pair.weight * len(pair.chosen) for pair in pairs)


def dpo_loss(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        chosen, rejected = (summed(model, pair.prompt, side) for side in (pair.chosen, pair.rejected))
        with torch.no_grad():
            anchor = summed(reference, pair.prompt, pair.chosen) - summed(reference, pair.prompt, pair.rejected)
        loss = -logsigmoid(DPO["beta"] * (chosen - rejected - anchor)) - DPO["sft_coef"] * chosen / len(pair.chosen)
        total = total + pair.weight * loss
    return total / sum(pair.weight for pair in pairs)


def ppo_loss(model: PreTrainedModel, weight: Tensor, bias: Tensor, experiences: list[dict[str, Tensor]]) -> Tensor:
    actor = critic = torch.zeros((), dtype=torch.float64)
    tokens = states = below = above = bounded = far = 0
    for experience in experiences:
        for index in range(len(experience["tokens"])):
            e = SimpleNamespace(**{name: value[index] for name, value in experience.items() if value is not None})
            end, start = int(e.lengths), int(e.prompt_lengths)
            steps = end - start
            ids, advantages = e.tokens[:end].tolist(), e.advantages[:steps].double()
            rows = table(model, ids, start, PPO["sampling"]["temperature"])
            log_probs = torch.stack([row[token] for row, token in zip(rows, ids[start:], strict=True)])
            ratio = (log_probs - e.log_probs[:steps].double()).exp()
            low, high = 1 - PPO["objective"]["clip_low"], 1 + PPO["objective"]["clip_high"]
            loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(low, high))
            bound = -PPO["objective"]["dual_clip"] * advantages
            bounded += int(((advantages < 0) & (loss > bound)).sum())
            loss = torch.where(advantages < 0, torch.min(loss, bound), loss)
            entropy = -(rows.exp() * rows).sum(-1)
            kl = 0.5 * (log_probs - e.reference_log_probs[:steps].double()) ** 2
            actor = actor + (loss + PPO["kl"]["loss_coef"] * kl - PPO["objective"]["entropy_coef"] * entropy).sum()
            tokens += steps
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, start - 1 :]
            old, returns, counted = (x[: steps + 1] for x in (e.values.double(), e.returns.double(), e.value_mask))
            values = hidden @ weight[0] + bias
            clipped = old + (values - old).clamp(-PPO["critic"]["clip"], PPO["critic"]["clip"])
            critic = critic + 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)[counted].sum()
            states += int(counted.sum())
            below += int(((ratio < low) & (advantages < 0)).sum())
            above += int(((ratio > high) & (advantages > 0)).sum())
            far += int(((values - old).abs() > PPO["critic"]["clip"])[counted].sum())
    assert min(below, above, bounded, far) > 0 and below + above + bounded < tokens and far < states  # some are clipped
    return actor / tokens + PPO["critic"]["coef"] * critic / states


def oracle(case: dict, got: dict) -> dict[str, Tensor]:
    model, reference = (
        AutoModelForCausalLM.from_pretrained(case[name], dtype=torch.float64).eval() for name in ("model", "reference")
    )
    model.get_input_embeddings().padding_idx = None  # the pad token is a token like others where it is sampled
    pairs = [make_pairs(24)[number] for numbers in BATCHES for number in numbers]
    head = {name: value.double().requires_grad_() for name, value in got["weights"].items() if "critic_head" in name}
    if case["task"] == "ppo":
        ppo_loss(model, head["critic_head.weight"], head["critic_head.bias"], got["experience"]).backward()
    else:
        (sft_loss(model, pairs) if case["task"] == "sft" else dpo_loss(model, reference, pairs)).backward()
    return {f"model.{name}": p.grad for name, p in model.named_parameters()} | {n: x.grad for n, x in head.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each parameter's gradient to ``tolerance`` of its largest entry, or of a thousandth of the largest of all."""
    assert got.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        error = float((got[name].double() - value).abs().max())
        assert error <= tolerance * max(float(value.abs().max()), 1e-3 * largest), (name, error)


# One process


def tolerance(task: str, model: str) -> float:
    return 2e-5 if task == "ppo" else FLOAT64[model]


def default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native, where they are built (test_native_operators.py holds that they are called)."""


def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "CHOICE", "reference")


def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies that hold all logits, as for a head that is not plain."""
    probe = Head._find_scale
    monkeypatch.setattr(Head, "_find_scale", lambda self: probe(self) and None)


@pytest.mark.parametrize("path", [default, reference, unfused])
@pytest.mark.parametrize(("task", "model"), CASES)
def test_every_gradient_is_that_of_plain_autograd(folders, monkeypatch, task, model, path) -> None:
    path(monkeypatch)
    this = case(folders, task, model)
    got = run(this)
    assert_same(got["grads"], oracle(this, got), tolerance(task, model))


def off_by(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The 2-norm of the error of all gradients together, as a fraction of theirs."""
    errors = torch.stack([(got[name].double() - value).norm() for name, value in expected.items()])
    return float(errors.norm() / torch.stack([value.norm() for value in expected.values()]).norm())


# bf16 has 8 bits: what a few roundings one after the other, of activations and gradients through two layers, amount to.
BF16 = 8 * 2.0**-8


@pytest.mark.parametrize(("task", "model"), CASES)
def test_under_bf16_autocast_gradients_are_as_near_as_unfused_ones(folders, monkeypatch, task, model) -> None:
    this = case(folders, task, model, precision="bf16-mixed")
    fused = run(this)
    unfused(monkeypatch)
    plain = run(this)
    error = off_by(fused["grads"], oracle(this, fused))
    assert error < BF16
    assert error < 1.25 * off_by(plain["grads"], oracle(this, plain))


# Two processes, FSDP2


def sharded(folders, task: str, model: str, **trainer: object) -> dict:
    return case(folders, task, model, strategy="fsdp2", devices=2, **trainer)


@pytest.fixture(scope="module")
def two(folders, tmp_path_factory) -> dict:
    cases = {f"{task}-{model}": sharded(folders, task, model) for task, model in CASES}
    cases |= {f"{task}-{model}-bf16": sharded(folders, task, model, precision="bf16-mixed") for task, model in CASES}
    return results_of("gradient_cases.py", cases, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("task", "model"), CASES)
def test_every_gradient_over_two_sharded_processes_is_that_of_plain_autograd(folders, two, task, model) -> None:
    got = two[f"{task}-{model}"]
    assert_same(got["grads"], oracle(sharded(folders, task, model), got), tolerance(task, model))


@pytest.mark.parametrize(("task", "model"), CASES)
def test_two_sharded_processes_under_bf16_autocast(folders, two, task, model) -> None:
    got = two[f"{task}-{model}-bf16"]
    assert off_by(got["grads"], oracle(sharded(folders, task, model), got)) < BF16
