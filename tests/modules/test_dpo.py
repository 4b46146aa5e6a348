"""The DPO module: its reference, its gradient against one written out by hand, its options."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from making import make
from small_data import SmallData, log_prob, make_pairs, train
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.training.optimizer import AdamWOptions

DESCENT = {"optimizer": {"learning_rate": 1.0, "eps": 1e6}}  # plain gradient descent in effect, see test_sft.py
ALL = list(range(6))


def loss_by_hand(kind: str, policy: torch.nn.Module, reference: torch.nn.Module, beta: float, sft: float) -> Tensor:
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for pair in (make_pairs(24)[i] for i in ALL):
        chosen = log_prob(policy, pair.prompt, pair.chosen)
        a = chosen - log_prob(reference, pair.prompt, pair.chosen)
        b = log_prob(policy, pair.prompt, pair.rejected) - log_prob(reference, pair.prompt, pair.rejected)
        if kind == "sigmoid":
            loss = torch.log1p(torch.exp(-beta * (a - b)))
        elif kind == "hinge":
            loss = torch.clamp(1 - beta * (a - b), min=0)
        elif kind == "ipo_sum":
            loss = (a - b - 1 / (2 * beta)) ** 2
        else:
            loss = (a / len(pair.chosen) - b / len(pair.rejected) - 1 / (2 * beta)) ** 2
        total = total + pair.weight * (loss - sft * chosen / len(pair.chosen))
        weights += pair.weight
    return total / weights


@pytest.mark.parametrize("batches", [[ALL], [[0, 1, 2], [3], [4, 5]]], ids=["one batch", "three micro-batches"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "ipo_sum"])
def test_gradient_is_that_of_the_loss_by_hand(
    tiny_policy_dir: Path, other_policy_dir: Path, kind: str, batches: list[list[int]]
) -> None:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (tiny_policy_dir, other_policy_dir)
    )
    loss_by_hand(kind, policy, reference, beta=0.3, sft=0.2).backward()
    module = make(
        DPOModule,
        str(tiny_policy_dir),
        reference=str(other_policy_dir),
        beta=0.3,
        loss_type=kind,
        sft_coef=0.2,
        **DESCENT,
    )
    data = SmallData(tiny_policy_dir, batches, extra=2)
    after = train(module, data, precision="64-true", accumulate_grad_batches=3)
    for name, parameter in policy.named_parameters():
        got = (parameter.detach() - after[f"model.{name}"]) * 1e6
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_at_the_start_policy_and_reference_agree(tiny_policy_dir: Path) -> None:
    module = DPOModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=1e-12))
    train(module, SmallData(tiny_policy_dir, [ALL]))
    metrics = module.trainer.logged_metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2.0), abs=1e-6)
    assert float(metrics["train/margin"]) == float(metrics["rewards/chosen"]) == 0.0
    assert float(metrics["train/accuracy"]) == 0.5


def test_the_reference_is_frozen_apart_and_nowhere_saved(tiny_policy_dir: Path) -> None:
    module = DPOModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.05))
    train(module, SmallData(tiny_policy_dir, [ALL] * 3))
    original = AutoModelForCausalLM.from_pretrained(tiny_policy_dir).state_dict()
    for name, value in original.items():
        assert torch.equal(module.reference.model.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())
    own = {parameter.data_ptr() for parameter in module.policy.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in module.reference.parameters())
    assert not any("reference" in name for name in module.state_dict())
    trained = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in module.policy.parameters()}


def test_label_smoothing_is_for_the_sigmoid_loss_alone(tiny_policy_dir: Path) -> None:
    DPOModule(str(tiny_policy_dir), label_smoothing=0.1)
    for kind in ("ipo", "ipo_sum", "hinge"):
        with pytest.raises(InputError, match=f"model.label_smoothing: 0.1 has no meaning for loss_type {kind}"):
            DPOModule(str(tiny_policy_dir), loss_type=kind, label_smoothing=0.1)


def test_a_reference_of_another_vocabulary_is_an_error(
    tiny_policy_dir: Path, pad_is_eos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_policy_dir).save_pretrained(tmp_path)
    pad_is_eos_tokenizer.add_tokens(["word"])
    changed = pad_is_eos_tokenizer.backend_tokenizer.to_str().replace('"cat":', '"cow":')
    pad_is_eos_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(changed)
    module = DPOModule(str(tiny_policy_dir), reference=str(tmp_path))
    with pytest.raises(InputError, match=r"model.reference: .* has another vocabulary"):
        train(module, SmallData(tiny_policy_dir, [ALL]))


def test_training_prefers_the_chosen(tiny_policy_dir: Path) -> None:
    module = DPOModule(str(tiny_policy_dir), beta=0.5, optimizer=AdamWOptions(learning_rate=0.005))
    train(module, SmallData(tiny_policy_dir, [list(range(13))] * 10, held_out=True))
    metrics = module.trainer.callback_metrics
    assert float(metrics["val/accuracy"]) > 0.9
    assert float(metrics["val/margin"]) > 0.5


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_model_is_not_measured_against_itself(tiny_policy_dir: Path, other_policy_dir: Path, stage: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = SmallData(tiny_policy_dir, [ALL], held_out=True)
    data.test_dataloader = data.val_dataloader
    measure = getattr(trainer, stage)
    for reference in (None, str(tiny_policy_dir)):
        with pytest.raises(InputError, match=r"model.reference: .* is the model that is measured too"):
            measure(DPOModule(str(tiny_policy_dir), reference=reference), datamodule=data)
    measure(DPOModule(str(other_policy_dir), reference=str(tiny_policy_dir)), datamodule=data, verbose=False)
