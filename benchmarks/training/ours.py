"""Our modules, trained by Lightning as users do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, PromptBatch, Rollout
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.rewards import ModelReward
from training.meter import Meter
from training.sizes import Size, work


class Ends(Callback):
    """Tells the meter, and clocks the passes of the models."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.update: Any = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.register_step_post_hook(lambda *_: self.meter.add(optimizer_steps=1))
        self.meter.begin()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.update is not None:
            self.update.__exit__(None, None, None)
            self.update = None
        self.meter.step_ended()


class MeteredPPO(PPOModule):
    """PPO whose responses all have ``max_new_tokens`` tokens, with clocks around its parts."""

    meter: Meter
    ends: Ends

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        super().configure_model()
        for model, phase in ((self.reference, "reference"), (self.critic, "critic"), (self.policy, "old log-probs")):
            forward = model.forward
            model.forward = self._clocked(forward, phase)

    def _clocked(self, forward: Any, phase: str) -> Any:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                if self.ends.update is None:  # from the first pass with gradients to the end of the step
                    self.ends.update = self.meter.phase("update")
                    self.ends.update.__enter__()
                return forward(*args, **kwargs)
            with self.meter.phase(phase):
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


class Supervised:
    """Notes the loss and the tokens of each step; put before a module's class."""

    meter: Meter
    ends: Ends

    def configure_model(self) -> None:
        super().configure_model()  # type: ignore[misc]
        reference = getattr(self, "reference", None)
        if reference is not None and "forward" not in vars(reference):
            forward = reference.forward

            def clocked(*args: Any, **kwargs: Any) -> Any:
                with self.meter.phase("reference"):
                    return forward(*args, **kwargs)

            reference.forward = clocked

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sides = (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else (batch,)
        self.meter.add(tokens=sum(side.lengths.sum() for side in sides))
        return super().training_step(batch, batch_idx)  # type: ignore[misc]

    def log_dict(self, metrics: dict[str, Any], **kwargs: Any) -> None:
        self.meter.add(loss=metrics["train/loss"])


class MeteredSFT(Supervised, SFTModule):
    """SFT for the meter."""


class MeteredRewardModel(Supervised, RewardModelModule):
    """A reward model for the meter."""


class MeteredDPO(Supervised, DPOModule):
    """DPO for the meter."""


class Same(LightningDataModule):
    """The same batch in every step."""

    def __init__(self, tokenizer: Any, batch: Any, steps: int) -> None:
        super().__init__()
        self.tokenizer, self.batch, self.steps = tokenizer, batch, steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * self.steps, batch_size=None)


def run(
    task: str, size: Size, folder: Path, device: str, precision: str, meter: Meter, seed: int, **options: Any
) -> dict[str, Any]:
    """Trains ``meter.total`` steps; ``options`` are further ones of the module."""
    from transformers import AutoTokenizer

    warnings.filterwarnings("ignore")
    module, batch = MAKERS[task](size, folder, meter, seed, **options)
    ends = Ends(meter)
    module.meter, module.ends = meter, ends
    trainer = Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=1,
        precision="32-true" if precision == "float32" else "bf16-true",
        gradient_clip_val=None if task == "ppo" else 1.0,  # the Hugging Face trainer's default
        logger=False,
        callbacks=[ends],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    trainer.fit(module, datamodule=Same(tokenizer, batch, meter.total))
    names = ("policy", "reference", "critic", "reward", "scalar")
    models = [model for name in names if (model := getattr(module, name, None)) is not None]
    return meter.result(models, trainer.optimizers[0])


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[B, S]`` and lengths ``[B]``."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    return tokens, lengths


def _ppo(size: Size, folder: Path, meter: Meter, seed: int, **options: Any) -> tuple[Any, Any]:
    module = MeteredPPO(
        str(folder / "policy"),
        ModelReward(str(folder / "reward")),
        **{
            "learning_rate": size.learning_rate["ppo"],
            "adam_eps": 1e-8,
            "iterations": meter.total,
            "epochs": 1,
            "minibatches": size.minibatches,
            "max_new_tokens": size.new_tokens,
            "kl_coef": 0.05,
            "old_log_probs": "rollout",
            "max_grad_norm": None,
            "seed": seed,
            **options,
        },
    )
    tokens, lengths = padded(work(folder)["prompts"])
    rows = len(lengths)
    batch = PromptBatch(tokens, lengths, torch.arange(rows), torch.ones(rows), [""] * rows, {})
    return module, batch


def _sft(size: Size, folder: Path, meter: Meter, seed: int, **options: Any) -> tuple[Any, Any]:
    module = MeteredSFT(str(folder / "policy"), learning_rate=size.learning_rate["sft"], **options)
    return module, _demonstrations(work(folder)["demonstrations"])


def _reward_model(size: Size, folder: Path, meter: Meter, seed: int, **options: Any) -> tuple[Any, Any]:
    rate = size.learning_rate["reward_model"]
    module = MeteredRewardModel(str(folder / "reward"), head="trained", normalise="none", learning_rate=rate, **options)
    return module, _pairs(folder)


def _dpo(size: Size, folder: Path, meter: Meter, seed: int, **options: Any) -> tuple[Any, Any]:
    module = MeteredDPO(str(folder / "policy"), learning_rate=size.learning_rate["dpo"], **options)
    return module, _pairs(folder)


def _demonstrations(rows: list[list[list[int]]]) -> DemonstrationBatch:
    tokens, lengths = padded([prompt + response for prompt, response in rows])
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    return DemonstrationBatch(tokens, lengths, prompt_lengths, torch.ones(len(rows)))


def _pairs(folder: Path) -> PreferenceBatch:
    rows = work(folder)["pairs"]
    chosen = _demonstrations([[prompt, response] for prompt, response, _ in rows])
    rejected = _demonstrations([[prompt, response] for prompt, _, response in rows])
    return PreferenceBatch(chosen, rejected, torch.zeros(len(rows)), torch.ones(len(rows)))


MAKERS = {"ppo": _ppo, "sft": _sft, "reward_model": _reward_model, "dpo": _dpo}
