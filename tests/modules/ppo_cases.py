"""Runs of PPO and its relatives with the real DataModule, in one process and, as a script, in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from ppo_harness import LastTokenReward, TokenReward, make_module
from processes import run_cases

from rlhf_lightning import modules
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.collectives import all_gather_objects
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.models.sharding import full_state_dict
from rlhf_lightning.rewards import FunctionReward, ModelReward

WORDS = ["the", "one", "two", "three", "cat", "dog", "bird", "fish", "sees", "likes", "big", "small", "old", "new"]
WORDS += ["red", "green", "blue"]


def write_prompts(path: Path, rows: int = 10) -> None:
    """Prompts of 1 to 5 words, all different."""
    texts = [" ".join(WORDS[(row * 3 + i * 5) % len(WORDS)] for i in range(1 + row % 5)) for row in range(rows)]
    assert len(set(texts)) == rows
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train; the whole weights, every iteration's metrics, and what each process sampled."""
    own = LastTokenReward() if case.get("coarse") else TokenReward()
    reward = ModelReward(case["reward"]) if case.get("reward") else own
    if "function" in case:
        reward = FunctionReward(case["function"], on_error="skip")
    method = getattr(modules, case.get("method", "PPOModule"))
    module = make_module(case["policy"], reward, method, **case["options"])
    held_out = {"val_path": case["data"], "val_batch_size": 3} if case.get("validate") else {"validation_fraction": 0.0}
    data = PreferenceDataModule(case["data"], batch_size=case["batch_size"], **held_out)
    callbacks = [RunCheckpoint(every_n_batches=1, keep=10)] if case.get("checkpoints") else []
    options = {"devices": 1, "accelerator": "cpu", "max_epochs": 1, "use_distributed_sampler": False, **case["trainer"]}
    trainer = Trainer(
        logger=DummyLogger(),
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=case.get("folder"),
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=case.get("resume"))
    samples = [
        {int(row): text for row, text in zip(r.prompts.rows, r.responses, strict=True) if r.prompts.weights[0] > 0}
        for r in module.rollouts
    ]
    gathered = all_gather_objects(samples)
    weights = {f"policy.{name}": value.clone() for name, value in full_state_dict(module.policy).items()}
    if getattr(module, "critic", None) is not None:
        weights |= {f"critic.{name}": value.clone() for name, value in full_state_dict(module.critic).items()}
    merged = [{k: v for part in parts for k, v in part.items()} for parts in zip(*gathered, strict=True)]
    return {"weights": weights, "metrics": module.logged, "samples": merged}


if __name__ == "__main__":
    run_cases(run)
