"""Demonstrations beside PPO's prompts: PPO-ptx learns from those in training, validation watches their perplexity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from ppo_cases import run, write_prompts
from ppo_harness import TokenReward, fit, make_module
from processes import results_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning.batches import View
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError

# Pairs, a demonstration, a prompt without an answer, and a row that counts twice.
ROWS = [
    {"prompt": "the cat", "chosen": "sees a bird", "rejected": "is"},
    {"prompt": "one", "completion": "two three"},
    {"prompt": "a big dog likes the"},
    {"prompt": "the old fish", "chosen": "is red and green and blue", "rejected": "likes", "weight": 2.0},
    {"prompt": "who", "chosen": "he", "rejected": "the the"},
]
ANSWERED = [(row["prompt"], row.get("chosen", row.get("completion")), row.get("weight", 1.0)) for row in ROWS]


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def nll(folder: Path, tokenizer) -> tuple[Tensor, torch.nn.Module]:
    """The weighted mean a token, one unpadded row at a time, by the stock model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for prompt, answer, weight in ANSWERED:
        if answer is None:
            continue
        before = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([*before, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        logits = model(ids[None]).logits[0, len(before) - 1 : -1]
        total = total + weight * torch.nn.functional.cross_entropy(logits, ids[len(before) :], reduction="sum")
        count += weight * (len(ids) - len(before))
    return total / count, model


def gradients(folder: Path, data: Path, **options) -> dict[str, Tensor]:
    """Of the policy, at the only optimizer step."""
    module = make_module(
        folder, critic={"kind": "model"}, update={"max_grad_norm": None, "micro_batch_tokens": 16}, **options
    )
    kept: dict[str, Tensor] = {}
    before_step = module.on_before_optimizer_step

    def keep(optimizer):
        before_step(optimizer)
        kept.update({name: p.grad.clone() for name, p in module.policy.model.named_parameters()})

    module.on_before_optimizer_step = keep
    fit_on(module, PreferenceDataModule(str(data), batch_size=5, validation_fraction=0.0))
    return kept


def fit_on(module, data, **options):
    settings = {"max_epochs": 1, "logger": DummyLogger(), "enable_checkpointing": False, **options}
    run_of = Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **settings)
    run_of.fit(module, datamodule=data)
    return run_of


def test_the_gradient_gains_ptx_coef_times_that_of_the_demonstrations(tiny_policy_dir, tiny_tokenizer, rows_file):
    plain, mixed = gradients(tiny_policy_dir, rows_file), gradients(tiny_policy_dir, rows_file, ptx_coef=0.7)
    loss, model = nll(tiny_policy_dir, tiny_tokenizer)
    loss.backward()
    for name, parameter in model.named_parameters():
        gained = (mixed[name] - plain[name]).double()
        torch.testing.assert_close(
            gained, 0.7 * parameter.grad, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_loss_of_the_demonstrations_is_logged(tiny_policy_dir, tiny_tokenizer, rows_file):
    module = make_module(tiny_policy_dir, ptx_coef=0.7)
    fit_on(module, PreferenceDataModule(str(rows_file), batch_size=5, validation_fraction=0.0))
    assert module.logged[0]["policy/ptx_loss"] == pytest.approx(
        nll(tiny_policy_dir, tiny_tokenizer)[0].item(), rel=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_validation_logs_the_perplexity_of_held_out_answers(tiny_policy_dir, tiny_tokenizer, rows_file, temperature):
    write_prompts(rows_file.with_name("prompts.jsonl"))
    module = make_module(
        tiny_policy_dir,
        sampling={"temperature": temperature},
        update={"micro_batch_tokens": 16},
        optimizer={"learning_rate": 1e-12},
    )
    data = PreferenceDataModule(
        str(rows_file.with_name("prompts.jsonl")), val_path=str(rows_file), batch_size=10, val_batch_size=2
    )
    fit_on(module, data)
    expected = nll(tiny_policy_dir, tiny_tokenizer)[0].exp().item()
    assert [m["val/perplexity"] for m in module.logged if "val/scores" in m][-1] == pytest.approx(expected, rel=1e-5)


def test_without_answers_there_is_no_perplexity(tiny_policy_dir, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    module = make_module(tiny_policy_dir)
    fit_on(module, PreferenceDataModule(str(tmp_path / "prompts.jsonl"), batch_size=4, validation_fraction=0.4))
    validated = [metrics for metrics in module.logged if "val/scores" in metrics]
    assert validated and not any("val/perplexity" in metrics for metrics in validated)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_mix_the_demonstrations_in_as_one_does(tiny_policy_dir, rows_file, tmp_path, strategy):
    options = {
        "iterations": 2,
        "ptx_coef": 0.5,
        "critic": {"kind": "head"},
        "update": {"epochs": 2, "minibatches": 2},
        "optimizer": {"eps": 1e-3},
    }
    case = {"policy": str(tiny_policy_dir), "data": str(rows_file), "batch_size": 5, "options": options}
    one = run({**case, "trainer": {}})
    case["trainer"] = {"strategy": strategy, "devices": 2}
    two = results_of("ppo_cases.py", {"two": case}, tmp_path)["two"]
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-5)
    for expected, got in zip(one["metrics"], two["metrics"], strict=True):
        assert got["policy/ptx_loss"] == pytest.approx(expected["policy/ptx_loss"], rel=1e-4)


def test_demonstrations_without_any_answer_are_refused(tiny_policy_dir, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    data = PreferenceDataModule(str(tmp_path / "prompts.jsonl"), batch_size=4, validation_fraction=0.0)
    with pytest.raises(InputError, match=r"no row to train on has a response.*or set model\.ptx_coef to 0"):
        fit_on(make_module(tiny_policy_dir, TokenReward(), ptx_coef=0.1), data)


def test_batches_without_demonstrations_are_refused(tiny_policy_dir):
    with pytest.raises(InputError, match=r"model\.ptx_coef: 0.1 asks for demonstrations and the batches carry none"):
        fit(make_module(tiny_policy_dir, ptx_coef=0.1))


def test_an_answer_that_is_too_long_is_left_out_and_counted(rows_file, tiny_tokenizer):
    data = PreferenceDataModule(str(rows_file), validation_fraction=0.0, batch_size=5, max_response_tokens=4)
    data.prepare(View("prompts", demonstrations="all"), tiny_tokenizer)
    (batch,) = data.train_dataloader()
    answers = {
        prompt: (int(weight), int(length - start))
        for prompt, weight, length, start in zip(
            batch.prompts,
            batch.demonstrations.weights,
            batch.demonstrations.lengths,
            batch.demonstrations.prompt_lengths,
            strict=True,
        )
    }
    expected = {"the cat": (1, 4), "one": (1, 3), "a big dog likes the": (0, 0), "the old fish": (0, 0), "who": (1, 2)}
    assert answers == expected
    assert data.noted["prompt without its demonstration, which is over max_response_tokens"] == 1 and not data.dropped
    assert (batch.repeat(2).demonstrations, len(batch.repeat(2))) == (None, 10)
