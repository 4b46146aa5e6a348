"""Our modules, trained by Lightning as users do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.clock import Meter
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from rlhf_lightning.batches import PreferenceBatch, PromptBatch, Rollout
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.collate import collate
from rlhf_lightning.data.forms import PromptAlone
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Example
from rlhf_lightning.models.building import NetworkOptions
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.rewards import ModelReward
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions
from training.sizes import Size, work


class Watch(Callback):
    """Clocks around the parts of a module's step, and counts of what it does."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if isinstance(module, PPOModule):
            self._watch_ppo(module)
        elif (reference := getattr(module, "reference", None)) is not None:
            reference.forward = self.meter.clocked(reference.forward, "reference")
        module.log_dict = self._noting(module.log_dict)
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.meter.add(optimizer_steps=1))
        self.meter.begin()

    def _watch_ppo(self, module: PPOModule) -> None:
        """Also lets no token end a response: all have ``max_new_tokens`` of them."""
        for model, phase in (
            (module.reference, "reference"),
            (module.critic, "critic"),
            (module.policy, "old log-probs"),
        ):
            model.forward = self._until_the_update(model.forward, phase)
        sample = self.meter.clocked(module.generate, "rollout")

        def generate(prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
            rollout: Rollout = sample(prompts, iteration, **{**overrides, "eos_ids": []})
            self.meter.add(new_tokens=int(rollout.response_lengths.sum()))
            return rollout

        module.generate, module.score = generate, self.meter.clocked(module.score, "reward")

    def _until_the_update(self, forward: Any, phase: str) -> Any:
        """The pass, clocked without gradients; with the first that has them the update begins."""
        without_gradients = self.meter.clocked(forward, phase)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return without_gradients(*args, **kwargs)
            self.meter.phase_to_the_end("update")
            return forward(*args, **kwargs)

        return clocked

    def _noting(self, log_dict: Any) -> Any:
        names = {"train/loss": "loss", "objective/scores": "score", "objective/kl": "kl"}

        def noted(metrics: dict[str, Any], **kwargs: Any) -> None:
            self.meter.add(**{name: metrics[key] for key, name in names.items() if key in metrics})
            log_dict(metrics, **kwargs)

        return noted

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, PromptBatch):
            sides = (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else (batch,)
            self.meter.add(tokens=sum(side.lengths.sum() for side in sides))
        self.meter.step_ended()


def run(
    task: str, size: Size, folder: Path, device: str, precision: str, meter: Meter, seed: int, **network: Any
) -> dict[str, Any]:
    """Trains ``meter.total`` steps on the same rows, made into a batch anew in each; ``network``: `NetworkOptions`."""
    from transformers import AutoTokenizer

    warnings.filterwarnings("ignore")
    module = make_module(task, size, folder, meter.total, seed, NetworkOptions(**network))
    trainer = make_trainer(task, LIGHTNING[precision], Watch(meter), device)
    pad_id = AutoTokenizer.from_pretrained(folder / "policy").pad_token_id
    kind, rows = examples(task, work(folder))
    batches: Any = rows * meter.total
    trainer.fit(module, DataLoader(batches, len(rows), collate_fn=lambda taken: collate(taken, kind, pad_id)))
    names = ("policy", "reference", "critic", "reward", "reward_model")
    models = [model for name in names if (model := getattr(module, name, None)) is not None]
    return meter.result(models, trainer.optimizers[0])


def make_module(task: str, size: Size, folder: Path, iterations: int, seed: int, network: NetworkOptions) -> Any:
    options = {"optimizer": AdamWOptions(learning_rate=size.learning_rate[task]), "network": network}
    policy, reward = str(folder / "policy"), str(folder / "reward")
    if task == "reward_model":
        return RewardModelModule(reward, head="trained", normalise="none", **options)
    if task != "ppo":
        return {"sft": SFTModule, "dpo": DPOModule}[task](policy, **options)
    return PPOModule(
        policy,
        ModelReward(reward),
        iterations=iterations,
        sampling=RolloutOptions(max_new_tokens=size.new_tokens),
        objective=ObjectiveOptions(old_log_probs="rollout"),
        update=UpdateOptions(epochs=1, minibatches=size.minibatches, max_grad_norm=None),
        seed=seed,
        **options,
    )


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
    kind: Kind = "prompts" if task == "ppo" else "demonstrations" if task == "sft" else "pairs"
    parts = [[row] for row in rows[kind]] if task == "ppo" else rows[kind]
    return kind, [_example(number, *row) for number, row in enumerate(parts)]


def _example(number: int, prompt: list[int], *responses: list[int]) -> Example:
    encoded = [np.array(ids, dtype=np.int32) for ids in (prompt, *responses)]
    record = Record("", (), (), where=f"row {number}", form=PromptAlone())
    return Example(encoded[0], tuple(encoded[1:]), margin=0.0, weight=1.0, row=number, record=record)


LIGHTNING: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-true", "bf16-mixed": "bf16-mixed"}
