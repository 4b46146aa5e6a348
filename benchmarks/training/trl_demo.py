"""TRL 1.12.0's PPO on the demo's models and prompts, with the settings of configs/demo/ppo.yaml where it has them.

    python -m training.trl_demo SETTINGS

``SETTINGS``: a JSON file with the folders ``policy`` and ``reward``, the token ids of ``prompts``, the numbers of the
config, and ``out``, where the trained model and ``curve.json`` (score and KL of every iteration) go.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOTrainer

from training.trl_ppo import configured


class Curve(TrainerCallback):
    """Score and KL of every iteration."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.points.append({"score": logs["objective/scores"], "kl": logs["objective/kl"]})


def _scalar(folder: str) -> Any:
    """The reward model, its head giving (score - mean) / deviation."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).float()
    mean, deviation = model.config.reward_mean, model.config.reward_std
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / deviation)
        head.bias.fill_(-mean / deviation)
    model.score = head
    return model


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    out = Path(settings["out"])
    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(settings["policy"]).float() for _ in range(2))
    reward, critic = (_scalar(settings["reward"]) for _ in range(2))
    rates = (settings["learning_rate"], settings["critic_learning_rate"])
    groups = [{"params": list(m.parameters()), "lr": r} for m, r in zip((policy, critic), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    config = configured(
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
    )
    curve = Curve()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": settings["prompts"]}),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[curve],
    )
    trainer.train()
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "curve.json").write_text(json.dumps(curve.points))


if __name__ == "__main__":
    main()
