"""TRL 1.12.0's `experimental.ppo.PPOTrainer`, set up as for training in earnest: no evaluation, saving or samples.

All rows in one batch (`local_rollout_forward_batch_size` and `per_device_train_batch_size`), so that nothing is split
that need not be, but for minibatches of more than memory holds; no gradient checkpointing, which would be slower; TRL's
default optimizer, the fused AdamW.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from training.meter import Meter
from training.sizes import PRECISIONS, Size, work


class Ends(TrainerCallback):
    """Tells the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.update: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.meter.add(score=logs["objective/scores"], kl=logs["objective/kl"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.update is not None:
            self.update.__exit__(None, None, None)
            self.update = None
        self.meter.step_ended()


def configured(**options: Any) -> PPOConfig:
    """TRL's options, those that all comparisons share among them."""
    return PPOConfig(
        temperature=1.0,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        gamma=1.0,
        lam=0.95,
        whiten_rewards=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def run(task: str, size: Size, folder: Path, device: str, precision: str, meter: Meter, seed: int) -> dict[str, Any]:
    """Trains ``meter.total`` iterations."""
    dtype = getattr(torch, PRECISIONS[precision])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    # A pad of its own, outside the vocabulary, as TRL's own script adds one: a sampled id that is also the pad's would
    # be taken for the end of the response. It never reaches a model.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    ends = Ends(meter)
    micro = size.micro_rows or size.prompts
    with tempfile.TemporaryDirectory() as out:
        config = configured(
            output_dir=out,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size.prompts // micro,
            local_rollout_forward_batch_size=size.prompts,
            num_mini_batches=size.minibatches,
            num_ppo_epochs=1,
            total_episodes=size.prompts * meter.total,
            response_length=size.new_tokens,
            stop_token=None,
            kl_coef=0.05,
            learning_rate=size.learning_rate["ppo"],
            lr_scheduler_type="constant",
            use_cpu=device == "cpu",
            bf16=precision == "bf16-mixed",  # autocast, in the passes that TRL has under it
            seed=seed,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": work(folder)["prompts"]}),
            callbacks=[ends],
        )
        # TRL takes the option for the passes of the whole batch, accelerate for those of an optimizer step. Accelerate
        # would also step after every pass once the loader's last batch is out, which the only one always is.
        accumulation = trainer.accelerator.gradient_state.plugin_kwargs
        accumulation["num_steps"] = max(1, size.prompts // size.minibatches // micro)
        accumulation["sync_with_dataloader"] = False
        _watch(trainer, meter, ends)
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    return meter.result((policy, reference, critic, reward), optimizer)


def _watch(trainer: Any, meter: Meter, ends: Ends) -> None:
    """Clocks around the parts of the trainer's step, and counts of what it does."""
    batch_generation, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward

    def generation(model: Any, queries: Any, *args: Any) -> Any:
        with meter.phase("rollout"):
            result = batch_generation(model, queries, *args)
        meter.add(new_tokens=result[0].numel() - queries.numel())
        return result

    def passes(model: Any, *args: Any) -> Any:
        if model is trainer.ref_model:
            with meter.phase("reference"):
                return forward(model, *args)
        if ends.update is None:  # from the first pass of the update to the end of the step
            ends.update = meter.phase("update")
            ends.update.__enter__()
        return forward(model, *args)

    def scores(model: Any, *args: Any) -> Any:
        with meter.phase("reward" if model is trainer.reward_model else "critic"):
            return get_reward(model, *args)

    ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward = generation, passes, scores
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: meter.add(optimizer_steps=1))
