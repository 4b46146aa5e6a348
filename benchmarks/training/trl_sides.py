"""TRL's trainers, set up as for training in earnest: no evaluation, saving or samples.

PPO is 1.12.0's `experimental.ppo.PPOTrainer`, SFT, reward models and DPO are 1.16's; each is imported where it is used,
for its version alone has it. TRL's default optimizer, the fused AdamW, and no gradient checkpointing, which would be
slower. PPO has all rows in one batch (`local_rollout_forward_batch_size` and `per_device_train_batch_size`), so that
nothing is split that need not be, but for minibatches of more than memory holds. The others are given token ids, one
batch of all rows a step, which TRL pads: its `padding_free` needs FlashAttention for SFT and is switched off in DPO.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness.clock import Meter
from harness.worker import Serve
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from training.sizes import PRECISIONS, Size, work

QUIET = {
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Ends(TrainerCallback):
    """Tells the meter of steps, and of PPO's scores."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "objective/scores" in logs:
            self.meter.add(score=logs["objective/scores"], kl=logs["objective/kl"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.step_ended()


def run(
    task: str, size: Size, folder: Path, device: str, precision: str, meter: Meter, seed: int, **options: Any
) -> dict[str, Any]:
    """Trains ``meter.total`` steps; ``options`` are further ones of the trainer."""
    dtype = getattr(torch, PRECISIONS[precision])
    options |= {"use_cpu": device == "cpu", "bf16": precision == "bf16-mixed", "seed": seed}  # bf16 is autocast
    options |= {"learning_rate": size.learning_rate[task], "lr_scheduler_type": "constant"}
    trains = _ppo if task == "ppo" else _supervised
    with tempfile.TemporaryDirectory() as out:
        trainer, models = trains(task, size, folder, dtype, meter, {"output_dir": out, **options})
        trainer.train()
    return meter.result(models, trainer.optimizer.optimizer)


def _causal(folder: Path | str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _scalar(folder: Path | str, dtype: torch.dtype) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)


# PPO, of TRL 1.12.0


def _ppo_trainer(
    models: tuple[Any, ...], tokenizer: Any, prompts: list[list[int]], callback: TrainerCallback, **options: Any
) -> Any:
    """Of policy, reference, reward model and critic, with the settings that all comparisons share."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shared = {"temperature": 1.0, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95}
    optimizers = options.pop("optimizers", (None, None))
    names = ("model", "ref_model", "reward_model", "value_model")
    return PPOTrainer(
        args=PPOConfig(**shared, whiten_rewards=False, num_sample_generations=0, **QUIET, **options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        optimizers=optimizers,
        callbacks=[callback],
        **dict(zip(names, models, strict=True)),
    )


def _ppo(task: str, size: Size, folder: Path, dtype: torch.dtype, meter: Meter, options: dict[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    # A pad of its own, outside the vocabulary, as TRL's own script adds one: a sampled id that is also the pad's would
    # be taken for the end of the response. It never reaches a model.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy, reference = (_causal(folder / "policy", dtype) for _ in range(2))
    critic, reward = (_scalar(folder / "reward", dtype) for _ in range(2))
    micro = size.micro_rows or size.prompts
    models = (policy, reference, reward, critic)
    options |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": size.prompts // micro}
    options |= {"local_rollout_forward_batch_size": size.prompts, "num_mini_batches": size.minibatches}
    options |= {"num_ppo_epochs": 1, "total_episodes": size.prompts * meter.total, "response_length": size.new_tokens}
    options |= {"stop_token": None, "kl_coef": 0.05}
    trainer = _ppo_trainer(models, tokenizer, work(folder)["prompts"], Ends(meter), **options)
    # TRL takes the option for the passes of the whole batch, accelerate for those of an optimizer step. Accelerate
    # would also step after every pass once the loader's last batch is out, which the only one always is.
    accumulation = trainer.accelerator.gradient_state.plugin_kwargs
    accumulation["num_steps"] = max(1, size.prompts // size.minibatches // micro)
    accumulation["sync_with_dataloader"] = False
    _watch_ppo(trainer, meter)
    return trainer, models


def _watch_ppo(trainer: Any, meter: Meter) -> None:
    """Clocks around the parts of the trainer's step, and counts of what it does."""
    from trl.experimental.ppo import ppo_trainer

    batch_generation, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward

    def generation(model: Any, queries: Any, *args: Any) -> Any:
        with meter.phase("rollout"):
            result = batch_generation(model, queries, *args)
        meter.add(new_tokens=result[0].numel() - queries.numel())
        return result

    def passes(model: Any, *args: Any) -> Any:
        if model is trainer.ref_model:
            return meter.clocked(forward, "reference")(model, *args)
        meter.phase_to_the_end("update")  # from its first pass
        return forward(model, *args)

    def scores(model: Any, *args: Any) -> Any:
        name = "reward" if model is trainer.reward_model else "critic"
        return meter.clocked(get_reward, name)(model, *args)

    ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward = generation, passes, scores
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: meter.add(optimizer_steps=1))


# SFT, reward models and DPO, of TRL 1.16


class Watched:
    """Notes the loss and the tokens of each step, and serves the rows in their order; put before a trainer's class."""

    meter: Meter

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.meter.add(tokens=inputs["attention_mask"].sum())
        result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.meter.add(loss=(result[0] if isinstance(result, tuple) else result).detach())
        return result

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)  # type: ignore[misc]
        optimizer.register_step_post_hook(lambda *_: self.meter.add(optimizer_steps=1))
        return optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def _supervised(task: str, size: Size, folder: Path, dtype: torch.dtype, meter: Meter, options: dict[str, Any]) -> Any:
    import trl

    class WatchedDPO(Watched, trl.DPOTrainer):
        """Its rows are token ids already."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    options |= {"per_device_train_batch_size": size.rows, "max_steps": meter.total, "max_length": None}
    options |= {"logging_strategy": "no", **QUIET}
    rows, more = work(folder), {}
    model = (_scalar if task == "reward_model" else _causal)(folder / NAMES[task], dtype)
    if task == "reward_model":
        kind, config = type("WatchedReward", (Watched, trl.RewardTrainer), {}), trl.RewardConfig(**options)
        data = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in rows["pairs"]]
    elif task == "sft":
        kind = type("WatchedSFT", (Watched, trl.SFTTrainer), {})
        config = trl.SFTConfig(**options, completion_only_loss=True, shuffle_dataset=False)
        data = [{"input_ids": p + r, "completion_mask": [0] * len(p) + [1] * len(r)} for p, r in rows["demonstrations"]]
    else:
        kind, config = WatchedDPO, trl.DPOConfig(**options, beta=0.1)
        data = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows["pairs"]]
        more = {"ref_model": _causal(folder / "policy", dtype)}
    kind.meter = meter
    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(data * meter.total),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[Ends(meter)],
        **more,
    )
    if more:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        reference.forward = meter.clocked(reference.forward, "reference")
    return trainer, [model, *more.values()]


NAMES = {"sft": "policy", "reward_model": "reward", "dpo": "policy"}  # of the model's folder


# PPO on the demo's models and prompts, for `demo_against_trl.py`


def serve() -> Serve:
    """For `harness.worker`."""
    return {}, demo


class Curve(TrainerCallback):
    """Score and KL of every iteration."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.points.append({"score": logs["objective/scores"], "kl": logs["objective/kl"]})


def demo(**settings: Any) -> dict[str, Any]:
    """Trains as configs/demo/ppo.yaml says where TRL has its settings; score and KL of every iteration.

    ``settings``: the folders ``policy`` and ``reward``, the token ids of ``prompts``, the numbers of the config, and
    ``out``, the folder whose ``model`` is the trained one.
    """
    torch.set_num_threads(settings["threads"])
    out = Path(settings["out"])
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    policy, reference = (_causal(settings["policy"], torch.float32) for _ in range(2))
    reward, critic = (_normalised(settings["reward"]) for _ in range(2))
    rates = (settings["learning_rate"], settings["critic_learning_rate"])
    groups = [{"params": list(m.parameters()), "lr": r} for m, r in zip((policy, critic), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    curve = Curve()
    trainer = _ppo_trainer(
        (policy, reference, reward, critic),
        tokenizer,
        settings["prompts"],
        curve,
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=settings["rows"],
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=settings["rows"] * settings["iterations"],
        response_length=settings["max_new_tokens"],
        stop_token="eos",
        kl_coef=settings["kl_coef"],
        use_cpu=True,
        bf16=False,
        seed=settings["seed"],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    trainer.train()
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return {"curve": curve.points}


def _normalised(folder: str) -> Any:
    """The reward model, its head giving (score - mean) / deviation."""
    model = _scalar(folder, torch.float32)
    mean, deviation = model.config.reward_mean, model.config.reward_std
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / deviation)
        head.bias.fill_(-mean / deviation)
    model.score = head
    return model
