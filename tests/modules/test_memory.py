"""Memory that runs out: the error names the sizes of the pass and the options, whatever the module and the pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from ppo_harness import fit, make_module
from small_data import SmallData, train
from torch import nn

from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import out_of_memory
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.ops import extension
from rlhf_lightning.rewards import ModelReward

ROWS = [[0, 1, 2]]


def starve(model: nn.Module, after: int = 0, grad: bool | None = None) -> None:
    """The trunk's pass number ``after`` (of those with a gradient, or without one) gets no memory."""
    trunk, passes = model.base_model, []
    forward = trunk.forward

    def starved(*args: Any, **kwargs: Any) -> Any:
        if grad is None or torch.is_grad_enabled() == grad:
            passes.append(1)
        if len(passes) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    trunk.forward = starved


@pytest.mark.parametrize(("cls", "rows"), [(SFTModule, 3), (DPOModule, 6), (RewardModelModule, 6)])
def test_offline_modules_name_their_batch(cls: type, rows: int, tiny_policy_dir: Path) -> None:
    class Starved(cls):
        def configure_model(self) -> None:
            super().configure_model()
            starve(self.model.model)

    module, data = Starved(str(tiny_policy_dir)), SmallData(tiny_policy_dir, ROWS)
    data.batch_size, data.batch_tokens = 3, 512
    with pytest.raises(torch.OutOfMemoryError) as told:
        train(module, data)
    words = str(told.value)
    width = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in data.pairs[:3])
    if cls is SFTModule:
        width = max(len(pair.prompt) + len(pair.chosen) for pair in data.pairs[:3])
    assert f"the last forward pass was of {rows} rows x {width} tokens, vocabulary 64, float32" in words
    assert "--data.batch_tokens (512) or --data.batch_size (3)" in words
    assert "--model.network.gradient_checkpointing true" in words and "Tried to allocate 2.00 GiB" in words


def test_a_training_that_fails_gives_kept_memory_back(tiny_policy_dir: Path) -> None:
    kept = []

    class Failing(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            kept.append(keeps_memory())
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        train(Failing(str(tiny_policy_dir)), SmallData(tiny_policy_dir, ROWS))
    assert kept == [extension.LOADED] and not keeps_memory()


def keeps_memory() -> bool:
    """Blocks that are kept begin with a huge page, those of malloc behind its own header."""
    return torch.empty(1 << 20).data_ptr() % (1 << 21) == 0


@pytest.mark.parametrize(
    ("phase", "knobs"),
    [
        ("rollout", ["in rollout", "--data.batch_size", "--model.sampling.max_new_tokens (6)"]),
        ("score", ["in score", "--model.update.micro_batch_tokens (64)"]),
        (
            "update",
            ["in update", "--model.update.micro_batch_tokens (64)", "--model.network.gradient_checkpointing true"],
        ),
        ("reward", ["--model.update.micro_batch_tokens (64)", "lower micro_batch_tokens of the reward model"]),
    ],
)
def test_ppo_names_the_part_of_the_step_and_its_options(
    phase: str, knobs: list[str], tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    module = make_module(tiny_policy_dir, ModelReward(str(tiny_reward_dir)), critic={"kind": "head"})
    build, generate, evaluate = module.configure_model, module.generate, module.evaluate

    def configured() -> None:
        build()
        if phase == "update":
            starve(module.policy.model, grad=True)
        if phase == "reward":
            starve(module.reward.scalar.model)

    def starving(pass_name: str, stock: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if phase == pass_name:
                starve(module.policy.model, after=1)
            return stock(*args, **kwargs)

        return run

    module.configure_model = configured
    module.generate, module.evaluate = starving("rollout", generate), starving("score", evaluate)
    with pytest.raises(torch.OutOfMemoryError) as told:
        fit(module)
    words = str(told.value)
    assert all(knob in words for knob in knobs), words
    assert " rows x " in words and "vocabulary 64, float32" in words


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_held_out_batches_have_their_own_option(command: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"one {word}", "completion": "two"} for word in ("cat", "dog", "bird", "fish")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataModule(str(tmp_path / "rows.jsonl"), val_batch_size=3, validation_fraction=0.5)
    module = SFTModule(str(tiny_policy_dir))
    configure = module.configure_model

    def configured() -> None:
        configure()
        starve(module.policy.model)

    module.configure_model = configured
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(torch.OutOfMemoryError) as told:
        getattr(trainer, command)(module, datamodule=data)
    words = str(told.value)
    assert "--data.val_batch_size (3)" in words and "--data.batch_size" not in words
    assert "gradient_checkpointing" not in words and "accumulate" not in words
    assert ("in rollout" in words) == (command == "predict")


def test_the_cpus_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(told.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
