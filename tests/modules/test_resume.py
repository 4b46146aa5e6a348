"""A run resumed from a checkpoint equals the uninterrupted one bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from making import make
from small_data import SmallData, train

from rlhf_lightning.callbacks.checkpoint_files import latest
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.model_export import ModelExport
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.optimizer import AdamWOptions

BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]
MODULES = {"sft": SFTModule, "reward_model": RewardModelModule, "dpo": DPOModule}


class Crash(RuntimeError):
    """What ends the interrupted run."""


class CrashAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: object, module: RLHFModule, batch: object, batch_idx: int) -> None:
        if self.batches == 0:
            raise Crash
        self.batches -= 1


SCHEDULE = {"learning_rate": 0.01, "schedule": "linear", "warmup_steps": 2}


def fit(kind: str, folder: Path, run: Path, *callbacks: Callback, **options: object) -> tuple[dict, RLHFModule]:
    kind, _, adapter = kind.partition("-")
    lora = {"lora": {"rank": 4}} if adapter else {}
    module = make(MODULES[kind], str(folder), optimizer=SCHEDULE, **lora)
    resume = options.pop("ckpt_path", None)
    data = SmallData(folder, BATCHES, held_out=bool(options.pop("held_out", False)))
    settings = {
        "default_root_dir": run,
        "callbacks": [
            RunCheckpoint(every_n_batches=options.pop("every_n_batches", 2), keep=5),
            ModelExport(),
            *callbacks,
        ],
        "enable_checkpointing": True,
        "max_epochs": 2,
        **options,
    }
    return train(module, data, ckpt_path=resume, **settings), module


def exported_config(run: Path) -> str:
    """The exported model's config, which has the normalisation of a reward model."""
    return (run / "model" / "config.json").read_text()


@pytest.mark.parametrize("kind", MODULES)
# In the middle of an epoch; right at its end; in the second one.
@pytest.mark.parametrize("crash_after", [3, 6, 9])
def test_resume_is_bit_for_bit(kind: str, crash_after: int, tiny_policy_dir: Path, tmp_path: Path) -> None:
    expected, straight = fit(kind, tiny_policy_dir, tmp_path / "straight")
    with pytest.raises(Crash):
        fit(kind, tiny_policy_dir, tmp_path / "broken", CrashAfter(crash_after))
    checkpoint = latest(tmp_path / "broken" / "checkpoints")
    assert checkpoint.name == f"batch-{crash_after // 2 * 2:08d}.ckpt"
    got, resumed = fit(kind, tiny_policy_dir, tmp_path / "broken", ckpt_path=str(checkpoint))
    assert resumed.trainer.global_step == straight.trainer.global_step == 12
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    moments = [module.trainer.optimizers[0].state_dict()["state"] for module in (straight, resumed)]
    for index, state in moments[0].items():
        assert all(torch.equal(moments[1][index][name], value) for name, value in state.items())
    assert exported_config(tmp_path / "broken") == exported_config(tmp_path / "straight")


class CrashInValidation(Callback):
    """In the one that comes after ``batches`` batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_validation_start(self, trainer: object, module: RLHFModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            raise Crash


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 12}])
def test_a_run_stopped_in_its_last_validation_makes_it_when_it_is_resumed(
    end: dict, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    options = {"held_out": True, "every_n_batches": 3, **end}
    _, straight = fit("sft", tiny_policy_dir, tmp_path / "straight", **options)
    with pytest.raises(Crash):
        fit("sft", tiny_policy_dir, tmp_path / "broken", CrashInValidation(12), **options)
    checkpoint = latest(tmp_path / "broken" / "checkpoints")
    _, resumed = fit("sft", tiny_policy_dir, tmp_path / "broken", ckpt_path=str(checkpoint), **options)
    metrics = [module.trainer.callback_metrics["val/loss"] for module in (straight, resumed)]
    assert torch.equal(*metrics)
    assert resumed.trainer.global_step == 12
    assert latest(tmp_path / "broken" / "checkpoints").name == "batch-00000012.ckpt"


# The last checkpoint would be due after the last of 12 batches, or not; it is made once the last epoch is over.
@pytest.mark.parametrize("every_n_batches", [2, 5])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_finished_reward_model_is_exported_again_as_it_was(
    held_out: bool, every_n_batches: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    options = {"held_out": held_out, "every_n_batches": every_n_batches}
    fit("reward_model", tiny_policy_dir, tmp_path, **options)
    config = tmp_path / "model" / "config.json"
    first = config.read_text()
    assert json.loads(first)["reward_mean"] != 0.0
    for file in config.parent.iterdir():
        file.unlink()
    newest = str(latest(tmp_path / "checkpoints"))
    fit("reward_model", tiny_policy_dir, tmp_path, ckpt_path=newest, **options)
    assert config.read_text() == first


@pytest.mark.parametrize("crash_after", [3, 6])
def test_resume_with_the_real_data_and_validation(crash_after: int, tiny_policy_dir: Path, tmp_path: Path) -> None:
    words = ["one", "two", "three", "red", "green", "blue", "cat", "dog", "bird", "fish"]
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a} {a}"} for a in words[:6] for b in words[6:10]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fit_real(run: str, *callbacks: Callback, ckpt_path: str | None = None) -> dict:
        data = PreferenceDataModule(str(tmp_path / "rows.jsonl"), batch_size=4, validation_fraction=0.2)
        module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01, schedule="cosine"))
        checkpoint = RunCheckpoint(every_n_batches=1)
        options = {"callbacks": [checkpoint, *callbacks], "enable_checkpointing": True, "max_epochs": 3}
        return train(module, data, ckpt_path=ckpt_path, default_root_dir=tmp_path / run, **options)

    expected = fit_real("straight")
    with pytest.raises(Crash):
        fit_real("broken", CrashAfter(crash_after))
    got = fit_real("broken", ckpt_path=str(latest(tmp_path / "broken" / "checkpoints")))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["reward_model", "dpo", "dpo-lora"])
def test_resume_under_fsdp2_from_a_folder_of_shards(kind: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    try:
        expected, _ = fit(kind, tiny_policy_dir, tmp_path / "straight", strategy="fsdp2")
        with pytest.raises(Crash):
            fit(kind, tiny_policy_dir, tmp_path / "broken", CrashAfter(9), strategy="fsdp2")
        checkpoint = latest(tmp_path / "broken" / "checkpoints")
        assert checkpoint.is_dir()
        got, _ = fit(kind, tiny_policy_dir, tmp_path / "broken", strategy="fsdp2", ckpt_path=str(checkpoint))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert exported_config(tmp_path / "broken") == exported_config(tmp_path / "straight")


def test_the_configured_learning_rate_wins_over_the_checkpoints(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fit("sft", tiny_policy_dir, tmp_path, CrashAfter(3))
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.5))
    data = SmallData(tiny_policy_dir, BATCHES)
    train(module, data, ckpt_path=str(latest(tmp_path / "checkpoints")), default_root_dir=tmp_path)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_a_checkpoint_loads_with_weights_only(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit("reward_model", tiny_policy_dir, tmp_path)
    saved = torch.load(latest(tmp_path / "checkpoints"), weights_only=True)
    assert saved["global_step"] == 12
