"""TRL 1.16's trainers of SFT, reward models and DPO, set up as for training in earnest: no evaluation and no saving.

The rows are handed over as token ids, one batch of all of them a step. TRL pads them: its `padding_free` needs
FlashAttention for SFT and is switched off in DPO. No gradient checkpointing, which would be slower; TRL's default
optimizer, the fused AdamW.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from training.meter import Meter
from training.sizes import PRECISIONS, Size, work


class Ends(TrainerCallback):
    """Tells the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.step_ended()


class Watched:
    """Notes the loss and the tokens of each step, and serves the rows in their order; put before a trainer's class."""

    meter: Meter

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.meter.add(tokens=inputs["attention_mask"].sum())
        result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.meter.add(loss=(result[0] if isinstance(result, tuple) else result).detach())
        return result

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class WatchedSFT(Watched, SFTTrainer):
    """SFT for the meter."""


class WatchedReward(Watched, RewardTrainer):
    """A reward model for the meter."""


class WatchedDPO(Watched, DPOTrainer):
    """DPO for the meter; its rows are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def run(
    task: str,
    size: Size,
    folder: Path,
    device: str,
    precision: str,
    meter: Meter,
    seed: int,
    torch_compile: bool = False,
) -> dict[str, Any]:
    """Trains ``meter.total`` steps."""
    dtype = getattr(torch, PRECISIONS[precision])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    with tempfile.TemporaryDirectory() as out:
        options = {
            "output_dir": out,
            "per_device_train_batch_size": size.rows,
            "max_steps": meter.total,
            "max_length": None,
            "learning_rate": size.learning_rate[task],
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "torch_compile": torch_compile,
            "bf16": precision == "bf16-mixed",  # autocast
            "use_cpu": device == "cpu",
            "seed": seed,
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        rows = work(folder)
        if task == "reward_model":
            model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=dtype)
            pairs = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in rows["pairs"]]
            trainer: Any = _built(WatchedReward, RewardConfig(**options), model, pairs, tokenizer, meter)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
            if task == "sft":
                demonstrations = [
                    {"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)}
                    for p, r in rows["demonstrations"]
                ]
                config = SFTConfig(**options, completion_only_loss=True, shuffle_dataset=False)
                trainer = _built(WatchedSFT, config, model, demonstrations, tokenizer, meter)
            else:
                pairs = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows["pairs"]]
                reference = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
                config = DPOConfig(**options, beta=0.1)
                trainer = _built(WatchedDPO, config, model, pairs, tokenizer, meter, ref_model=reference)
                _watch_reference(trainer, meter)
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    models = [model] if task != "dpo" else [model, reference]
    return meter.result(models, optimizer)


def _built(
    kind: Any, config: Any, model: Any, rows: list[dict[str, Any]], tokenizer: Any, meter: Meter, **more: Any
) -> Any:
    data = Dataset.from_list(rows * meter.total)
    trainer = kind(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Ends(meter)], **more
    )
    trainer.meter = meter
    create = trainer.create_optimizer

    def counted(*args: Any) -> Any:
        optimizer = create(*args)
        optimizer.register_step_post_hook(lambda *_: meter.add(optimizer_steps=1))
        return optimizer

    trainer.create_optimizer = counted
    return trainer


def _watch_reference(trainer: Any, meter: Meter) -> None:
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    forward = reference.forward

    def clocked(*args: Any, **kwargs: Any) -> Any:
        with meter.phase("reference"):
            return forward(*args, **kwargs)

    reference.forward = clocked
