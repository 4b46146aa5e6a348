"""However a run is stopped, the resumed one ends as the uninterrupted one: weights, records, counts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from making import make
from ppo_cases import write_prompts
from ppo_harness import TokenReward
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning import modules
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint, latest
from rlhf_lightning.callbacks.loop_position import batches_done
from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.data.datamodule import PreferenceDataModule

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
        for logger in loggers[:1]:
            logger.finalize("done")
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

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not any(word in tag for word in CLOCK)
    }
    return {"metrics": lines("metrics.jsonl"), "samples": lines("samples.jsonl"), "scalars": scalars}


def counts(run: Path) -> dict[str, Any]:
    """Lightning's counts in the newest checkpoint, without those of validation, which nothing reads."""
    progress = torch.load(latest(run / "checkpoints"), weights_only=True)["loops"]["fit_loop"]
    return {name: value for name, value in progress.items() if "val_loop" not in name}


def same(straight: Path, broken: Path) -> None:
    a, b = (torch.load(latest(run / "checkpoints"), weights_only=True) for run in (straight, broken))
    assert latest(straight / "checkpoints").name == latest(broken / "checkpoints").name
    for name, value in a["state_dict"].items():
        assert torch.equal(b["state_dict"][name], value), name
    for index, state in a["optimizer_states"][0]["state"].items():
        assert all(torch.equal(b["optimizer_states"][0]["state"][index][key], value) for key, value in state.items())
    assert a.get("on_policy") == b.get("on_policy")
    assert records(broken) == records(straight)
    assert counts(broken) == counts(straight)


@pytest.fixture(scope="module")
def straight(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of an uninterrupted run, made once for each case and its options."""
    made: dict[str, Path] = {}

    def of(case: str, **options: Any) -> Path:
        key = f"{case}{sorted(options.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "straight"
            fit(case, tiny_policy_dir, made[key], **options)
        return made[key]

    return of


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Lightning leaves SIGINT ignored after an interrupt."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def steps(case: str, batches: int) -> int:
    return batches * (2 if case in ("ppo", "grpo", "online_dpo") else 1)


class StopAfter(Callback):
    """As ``max_time`` does it: at a batch's end, whatever comes next."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.fit_loop.epoch_loop.batch_progress.total.ready >= self.batches


class Signal(Callback):
    """Sends this process a signal in batch ``batches``, at the named hook."""

    def __init__(self, batches: int, number: int, hook: str = "on_before_optimizer_step") -> None:
        self.batches, self.number, self.sent = batches, number, False
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches and not self.sent:
            self.sent = True  # a second Ctrl-C stops at once
            os.kill(os.getpid(), self.number)


# `make test-faults` runs every case with every stop; the test command runs each case and each stop at least once.
WHOLE = os.environ.get("RLHF_LIGHTNING_FAULTS") == "whole"
# Within an epoch, with a validation due and without; at an epoch's end; within the second epoch.
PLACES = [3, 4, 6, 9]
EVERY = list(itertools.product(CASES, PLACES))
SOME = [("sft", 3), ("sft", 6), ("sft-lora", 9), ("reward_model", 4), ("dpo", 9), ("ppo", 4), ("grpo", 3)]


@pytest.mark.parametrize(("case", "batches"), EVERY if WHOLE else [*SOME, ("online_dpo", 9)])
def test_an_earlier_end_can_be_moved(
    case: str, batches: int, straight: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    options = {"schedule": "constant"}
    fit(case, tiny_policy_dir, tmp_path / "broken", max_steps=steps(case, batches), **options)
    assert latest(tmp_path / "broken" / "checkpoints").name < "batch-00000011.ckpt"
    resume(case, tiny_policy_dir, tmp_path / "broken", **options)
    same(straight(case, **options), tmp_path / "broken")


@pytest.mark.parametrize("case", ["sft", "ppo"])
def test_a_later_end_trains_what_is_missing(case: str, straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"schedule": "constant"}
    shorter = {"iterations": 5} if case == "ppo" else {"max_epochs": 1}
    fit(case, tiny_policy_dir, tmp_path / "broken", **shorter, **options)
    resume(case, tiny_policy_dir, tmp_path / "broken", **options)
    same(straight(case, **options), tmp_path / "broken")


@pytest.mark.parametrize(
    ("case", "batches"), EVERY if WHOLE else [("sft", 4), ("sft", 6), ("reward_model", 3), ("ppo", 3)]
)
def test_max_time_within_an_epoch_loses_nothing(
    case: str, batches: int, straight: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    fit(case, tiny_policy_dir, tmp_path / "broken", StopAfter(batches))
    resume(case, tiny_policy_dir, tmp_path / "broken")
    same(straight(case), tmp_path / "broken")


@pytest.mark.parametrize("stop", ["max_time", "SIGTERM"])
def test_a_stop_waits_for_the_optimizer_step(stop: str, straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    ends = StopAfter(4) if stop == "max_time" else Signal(4, signal.SIGTERM, "on_train_batch_start")
    with contextlib.suppress(SystemExit):
        fit("sft", tiny_policy_dir, tmp_path / "broken", ends, **options)
    assert latest(tmp_path / "broken" / "checkpoints").name == "batch-00000006.ckpt"
    resume("sft", tiny_policy_dir, tmp_path / "broken", **options)
    same(straight("sft", **options), tmp_path / "broken")


# In a batch, in the validation after it, and in a rollout: case, hook, batch, batches in the checkpoint.
SIGNALS = [
    ("sft", "on_before_optimizer_step", 3, 3, signal.SIGINT),
    ("sft", "on_before_optimizer_step", 6, 6, signal.SIGTERM),
    ("sft", "on_validation_start", 4, 4, signal.SIGTERM),
    ("sft", "on_validation_start", 12, 12, signal.SIGINT),
    ("ppo", "on_phase", 4, 3, signal.SIGINT),
    ("ppo", "on_validation_start", 8, 8, signal.SIGUSR1),
]
ALL_SIGNALS = [
    (case, hook, batch, batch - (hook == "on_phase"), number)
    for case, (hook, batch), number in itertools.product(
        CASES,
        [
            ("on_before_optimizer_step", 3),
            ("on_before_optimizer_step", 6),
            ("on_validation_start", 4),
            ("on_validation_start", 12),
            ("on_phase", 4),
        ],
        [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1],
    )
    if hook != "on_phase" or "iterations" in CASES[case][1]
]


@pytest.mark.parametrize(("case", "hook", "batches", "saved", "number"), ALL_SIGNALS if WHOLE else SIGNALS)
def test_a_signal_saves_where_it_comes(
    case: str,
    hook: str,
    batches: int,
    saved: int,
    number: int,
    straight: Any,
    tiny_policy_dir: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit):
        fit(case, tiny_policy_dir, tmp_path / "broken", Signal(batches, number, hook))
    assert latest(tmp_path / "broken" / "checkpoints").name == f"batch-{saved:08d}.ckpt"
    resume(case, tiny_policy_dir, tmp_path / "broken")
    same(straight(case), tmp_path / "broken")


def test_two_interruptions_in_one_run(straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit("ppo", tiny_policy_dir, tmp_path / "broken", Signal(4, signal.SIGTERM, "on_validation_start"))
    with pytest.raises(SystemExit):
        resume("ppo", tiny_policy_dir, tmp_path / "broken", Signal(6, signal.SIGTERM, "on_phase"))
    resume("ppo", tiny_policy_dir, tmp_path / "broken")
    same(straight("ppo"), tmp_path / "broken")


class Killed(Exception):
    """Stands for SIGKILL: what is not on the disk is lost."""


class KilledAfterSave(RunCheckpoint):
    """Dies right after the save of batch ``at``."""

    at = 4

    def save(self, trainer: Trainer) -> None:
        super().save(trainer)
        if batches_done(trainer) == self.at:
            raise Killed


@pytest.mark.parametrize("case", CASES if WHOLE else ["sft", "ppo"])
def test_a_kill_after_a_save_loses_no_record(case: str, straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(case, tiny_policy_dir, tmp_path / "broken", checkpoint=KilledAfterSave(every_n_batches=2))
    resume(case, tiny_policy_dir, tmp_path / "broken")
    same(straight(case), tmp_path / "broken")
