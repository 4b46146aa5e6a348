"""Our modules, trained by Lightning as users do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from harness.clock import Meter
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.batches import PreferenceBatch, PromptBatch, Rollout
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.collate import collate
from rlhf_lightning.data.forms import PromptAlone
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Example
from rlhf_lightning.models.building import NetworkOptions
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.rewards import ModelReward, Reward
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions
from training.sizes import Size, work


class Ends(Callback):
    """Tells the meter, and clocks the passes of the models."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.register_step_post_hook(lambda *_: self.meter.add(optimizer_steps=1))
        self.meter.begin()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.meter.step_ended()


class MeteredPPO(PPOModule):
    """PPO whose responses all have ``max_new_tokens`` tokens, with clocks around its parts."""

    meter: Meter

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        super().configure_model()
        for model, phase in ((self.reference, "reference"), (self.critic, "critic"), (self.policy, "old log-probs")):
            forward = model.forward
            model.forward = self._clocked(forward, phase)

    def _clocked(self, forward: Any, phase: str) -> Any:
        without_gradients = self.meter.clocked(forward, phase)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return without_gradients(*args, **kwargs)
            self.meter.phase_to_the_end("update")  # from the first pass with gradients
            return forward(*args, **kwargs)

        return clocked

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        with self.meter.phase("rollout"):
            rollout = super().generate(prompts, iteration, **{**overrides, "eos_ids": []})
        self.meter.add(new_tokens=int(rollout.response_lengths.sum()))
        return rollout

    def score(self, rollout: Rollout) -> Tensor:
        with self.meter.phase("reward"):
            return super().score(rollout)

    def log_dict(self, metrics: dict[str, Any], **kwargs: Any) -> None:
        self.meter.add(score=float(metrics["objective/scores"]), kl=float(metrics["objective/kl"]))
        super().log_dict(metrics, **kwargs)


class Supervised:
    """Notes the loss and the tokens of each step; put before a module's class."""

    meter: Meter

    def configure_model(self) -> None:
        super().configure_model()  # type: ignore[misc]
        reference = getattr(self, "reference", None)
        if reference is not None and "forward" not in vars(reference):
            reference.forward = self.meter.clocked(reference.forward, "reference")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sides = (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else (batch,)
        self.meter.add(tokens=sum(side.lengths.sum() for side in sides))
        return super().training_step(batch, batch_idx)  # type: ignore[misc]

    def log_dict(self, metrics: dict[str, Any], **kwargs: Any) -> None:
        self.meter.add(loss=metrics["train/loss"])
        super().log_dict(metrics, **kwargs)  # type: ignore[misc]


class MeteredSFT(Supervised, SFTModule):
    """SFT for the meter."""


class MeteredRewardModel(Supervised, RewardModelModule):
    """A reward model for the meter."""


class MeteredDPO(Supervised, DPOModule):
    """DPO for the meter."""


class Same(LightningDataModule):
    """The same rows in every step, made into a batch anew in each."""

    def __init__(self, tokenizer: Any, kind: Kind, examples: list[Example], steps: int) -> None:
        super().__init__()
        self.tokenizer, self.kind, self.examples, self.steps = tokenizer, kind, examples, steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.examples * self.steps,  # type: ignore[arg-type]
            batch_size=len(self.examples),
            collate_fn=lambda examples: collate(examples, self.kind, self.tokenizer.pad_token_id),
        )


def run(
    task: str, size: Size, folder: Path, device: str, precision: str, meter: Meter, seed: int, **options: Any
) -> dict[str, Any]:
    """Trains ``meter.total`` steps; ``options`` are further ones of the module."""
    from transformers import AutoTokenizer

    warnings.filterwarnings("ignore")
    module = make_module(task, size, folder, meter, seed, **options)
    module.meter = meter
    trainer = make_trainer(task, LIGHTNING[precision], Ends(meter), device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    trainer.fit(module, datamodule=Same(tokenizer, *examples(task, work(folder)), meter.total))
    names = ("policy", "reference", "critic", "reward", "reward_model")
    models = [model for name in names if (model := getattr(module, name, None)) is not None]
    return meter.result(models, trainer.optimizers[0])


def make_trainer(task: str, precision: Any, callback: Callback, device: str = "cpu") -> Trainer:
    """Lightning's, for one epoch, with nothing beside the steps; ``precision`` is its own name for it."""
    return Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        precision=precision,
        gradient_clip_val=None if task == "ppo" else 1.0,  # the Hugging Face trainer's default
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def examples(task: str, rows: dict[str, Any]) -> tuple[Kind, list[Example]]:
    """The task's part of the work's ``rows``, as the library's own data module holds them."""
    kind, name = KINDS[task]
    parts = [[row] for row in rows[name]] if task == "ppo" else rows[name]
    return kind, [_example(number, *row) for number, row in enumerate(parts)]


def _example(number: int, prompt: list[int], *responses: list[int]) -> Example:
    encoded = [torch.tensor(ids, dtype=torch.int32) for ids in (prompt, *responses)]
    record = Record("", (), (), where=f"row {number}", form=PromptAlone())
    return Example(encoded[0], tuple(encoded[1:]), margin=0.0, weight=1.0, row=number, record=record)


def make_module(
    task: str, size: Size, folder: Path, meter: Meter, seed: int, compile_layers: bool = False, **options: Any
) -> Any:
    """The metered module; ``options`` are further ones of it."""
    rate, policy = size.learning_rate[task], str(folder / "policy")
    options = {"optimizer": AdamWOptions(learning_rate=rate), **options}
    options["network"] = NetworkOptions(compile_layers=compile_layers)
    if task == "sft":
        return MeteredSFT(policy, **options)
    if task == "dpo":
        return MeteredDPO(policy, **options)
    if task == "reward_model":
        return MeteredRewardModel(str(folder / "reward"), head="trained", normalise="none", **options)
    numbers = {
        "iterations": meter.total,
        "sampling": RolloutOptions(max_new_tokens=size.new_tokens),
        "objective": ObjectiveOptions(old_log_probs="rollout"),
        "update": UpdateOptions(epochs=1, minibatches=size.minibatches, max_grad_norm=None),
        "seed": seed,
    }
    return MeteredPPO(policy, ModelReward(str(folder / "reward")), **{**numbers, **options})


class EvenTokens(Reward):
    """The share of tokens with an even id: costs nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return (rollout.tokens % 2 == 0).float().mean(dim=1)


def make_bare_module(
    task: str, folder: Path | str, iterations: int, new_tokens: int, ppo: dict[str, Any] | None = None
) -> Any:
    """A module that no meter sees; PPO's reward costs nothing. ``ppo``: see `training.sizes.PROFILED`."""
    if task == "ppo":
        given = dict(ppo or {})
        sampling = {name: given.pop(name) for name in ("top_k", "top_p") if name in given}
        critic = CriticOptions(kind=given.pop("critic", "model"))
        return PPOModule(
            str(folder),
            EvenTokens(),
            iterations=iterations,
            sampling=RolloutOptions(max_new_tokens=new_tokens, **sampling),
            critic=critic,
            update=UpdateOptions(**given),
        )
    return {"sft": SFTModule, "dpo": DPOModule}[task](str(folder))


LIGHTNING: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-true", "bf16-mixed": "bf16-mixed"}
KINDS: dict[str, tuple[Kind, str]] = {
    "ppo": ("prompts", "prompts"),
    "sft": ("demonstrations", "demonstrations"),
    "reward_model": ("pairs", "pairs"),
    "dpo": ("pairs", "pairs"),
}
