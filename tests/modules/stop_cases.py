"""Runs of six methods that stop and go on: in one process, and as a script in several."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from making import make
from ppo_cases import write_prompts
from ppo_harness import TokenReward
from processes import run_cases
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning import modules
from rlhf_lightning.callbacks.checkpoint_files import latest
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.loop_position import batches_done
from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.collectives import rank
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.models.sharding import full_state_dict

_SAMPLING = {"sampling": {"max_new_tokens": 4}}
_UPDATE = {"iterations": 12, "update": {"epochs": 1, "minibatches": 2, "micro_batch_tokens": 64}, **_SAMPLING}
# name: the class and its options
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("SFTModule", {**_SAMPLING}),
    "sft-lora": ("SFTModule", {**_SAMPLING, "lora": {"rank": 2}}),
    "reward_model": ("RewardModelModule", {}),
    "dpo": ("DPOModule", {**_SAMPLING}),
    "ppo": ("PPOModule", {**_UPDATE, "kl": {"target": 1.0}, "scores": {"normalise": True}}),
    "grpo": ("GRPOModule", {**_UPDATE, "group_size": 2}),
    "online_dpo": ("OnlineDPOModule", {**_UPDATE, "group_size": 2}),
}


def fit(
    case: str,
    folder: Path,
    run: Path,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    checkpoint: RunCheckpoint | None = None,
    **options: Any,
) -> Any:
    name, given = CASES[case]
    samples = "iterations" in given
    reward = {"reward": TokenReward()} if samples else {}
    given = {**given, **({"iterations": options.pop("iterations")} if "iterations" in options else {})}
    given["optimizer"] = {"learning_rate": 0.01, "schedule": options.pop("schedule", "linear"), "warmup_steps": 2}
    module = make(getattr(modules, name), str(folder), **reward, **given)
    rows = run.parent / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    data = PreferenceDataModule(str(rows), batch_size=4, val_path=str(rows), val_batch_size=9)
    loggers = [TensorBoardLogger(save_dir=str(run.parent), name=run.name, version=""), JsonlLogger(run)]
    trainer = Trainer(
        **{
            "max_epochs": 1 if samples else 2,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": run,
            "logger": loggers,
            "callbacks": [
                *callbacks,
                SampleTable(rows=2, every_n_batches=3),
                checkpoint or RunCheckpoint(every_n_batches=2),
            ],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "log_every_n_steps": 1,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 2,
            **options,
        }
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    finally:
        loggers[0].finalize("done")
    return module


def write_rows(path: Path) -> None:
    prompts = path.with_name("prompts.jsonl")
    write_prompts(prompts, rows=24)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    rows = [{"prompt": text, "chosen": f"{text} cat", "rejected": f"{text[:5]} dog big"} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def resume(case: str, folder: Path, run: Path, *callbacks: Callback, **options: Any) -> Any:
    # TensorBoard reads event files in the order of their names, which begin with the second.
    time.sleep(1.0)
    return fit(case, folder, run, *callbacks, ckpt_path=latest(run / "checkpoints"), **options)


CLOCK = ("time", "tokens_per_second", "seconds")


def records(run: Path) -> dict[str, Any]:
    """What a run wrote, without clock times and rates."""

    def lines(name: str) -> list[Any]:
        path = run / name
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{k: v for k, v in row.items() if not any(word in k for word in CLOCK)} for row in rows]

    everything = dict.fromkeys(("scalars", "histograms", "tensors"), 0)
    events = EventAccumulator(str(run), size_guidance=everything).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not any(word in tag for word in CLOCK)
    }
    histograms = {
        tag: [(event.step, vars(event.histogram_value)) for event in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }
    texts = {
        tag: [(event.step, [text.decode() for text in event.tensor_proto.string_val]) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    told = {"scalars": scalars, "histograms": histograms, "texts": texts}
    return {"metrics": lines("metrics.jsonl"), "samples": lines("samples.jsonl"), **told}


def counts(run: Path) -> dict[str, Any]:
    """Lightning's counts in the newest checkpoint, without those of validation, which nothing reads."""
    progress = torch.load(latest(run / "checkpoints"), weights_only=True)["loops"]["fit_loop"]
    return {name: value for name, value in progress.items() if "val_loop" not in name}


def steps(case: str, batches: int) -> int:
    return batches * (2 if case in ("ppo", "grpo", "online_dpo") else 1)


class StopAfter(Callback):
    """As ``max_time`` does it: at a batch's end, whatever comes next."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.ready >= self.batches


class Signal(Callback):
    """Sends this process a signal in batch ``batches``, at the named hook; of a rollout, at its second token."""

    def __init__(self, batches: int, number: int, hook: str = "on_before_optimizer_step") -> None:
        self.batches, self.number, self.sent = batches, number, False
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *args: Any) -> None:
        if args[1:2] == ("rollout",) and args[2] == 0:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches and not self.sent:
            self.sent = True  # a second Ctrl-C stops at once
            os.kill(os.getpid(), self.number)


class Slow(Callback):
    """Takes its time for each token of batch ``batches``, and notes how many tokens were drawn."""

    def __init__(self, batches: int) -> None:
        self.batches, self.drawn = batches, 0

    def on_phase(self, trainer: Trainer, module: Any, phase: str, done: int, total: int) -> None:
        if phase == "rollout" and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            self.drawn = done
            time.sleep(1.1)


class Killed(Exception):
    """Stands for SIGKILL: what is not on the disk is lost."""


class KilledAfterSave(RunCheckpoint):
    """Dies right after the save of batch ``at``."""

    at = 4

    def save(self, trainer: Trainer) -> None:
        super().save(trainer)
        if batches_done(trainer) == self.at:
            raise Killed


def stopped(case: dict[str, Any], folder: Path, out: Path, options: dict[str, Any]) -> None:
    """The first attempt of a run, which ends as the case says."""
    method, batches, stop = case["method"], case["batches"], case["stop"]
    saved = batches
    if stop == "max_steps":
        fit(method, folder, out, max_steps=steps(method, batches), **options)
    elif stop == "max_time":
        fit(method, folder, out, StopAfter(batches), **options)
    elif stop == "SIGKILL":
        with contextlib.suppress(Killed):
            fit(method, folder, out, checkpoint=KilledAfterSave(every_n_batches=2), **options)
            raise AssertionError("the run was not killed")
    else:
        mine = int(os.environ["RANK"]) == case["to"]
        slow = Slow(batches if case["hook"] == "on_phase" else 0)
        with contextlib.suppress(SystemExit):
            fit(method, folder, out, Signal(batches, stop, case["hook"]) if mine else slow, **options)
            raise AssertionError("the run was not stopped")
        assert slow.drawn < _SAMPLING["sampling"]["max_new_tokens"], "the other process has finished its rollout"
        saved -= case["hook"] == "on_phase"
    assert latest(out / "checkpoints").name == f"batch-{saved:08d}.ckpt"


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train, or go on; in two attempts if anything stops the first. Returns the weights and records."""
    folder, out = Path(case["model"]), Path(case["run"])
    options = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": case["strategy"], **case.get("options", {})}
    if "stop" in case:
        stopped(case, folder, out, options)
        module = resume(case["method"], folder, out, **options)
    else:
        attempt = resume if case.get("goes_on") else fit
        module = attempt(case["method"], folder, out, **options)
    weights = {name: value.clone() for name, value in full_state_dict(module.model).items()}
    return {"weights": weights, "records": json.dumps(records(out)) if rank() == 0 else ""}


if __name__ == "__main__":
    run_cases(run)
