"""Checkpoints are whole or not there: killed at every point of a save, stopped by signals, out of space."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from processes import run_scripts
from small_data import SmallData, train

from rlhf_lightning.callbacks.checkpoint_files import latest
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.optimizer import AdamWOptions

HERE = Path(__file__).parent
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def fit(folder: Path, run: Path, *callbacks: Callback, module: RLHFModule | None = None, **options: object) -> Trainer:
    module = module or SFTModule(str(folder), optimizer=AdamWOptions(learning_rate=0.01))
    options = {"enable_checkpointing": True, "callbacks": list(callbacks), "default_root_dir": run, **options}
    train(module, SmallData(folder, BATCHES), **options)
    return module.trainer


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*.ckpt"))


def test_saves_by_batches_and_at_the_end_and_keeps_the_newest(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(every_n_batches=2, keep=2))
    assert names(tmp_path) == ["batch-00000004.ckpt", "batch-00000005.ckpt"]
    assert latest(tmp_path / "checkpoints").name == "batch-00000005.ckpt"


def test_waits_for_the_optimizer_step(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(every_n_batches=1, keep=9), accumulate_grad_batches=2)
    assert names(tmp_path) == [f"batch-0000000{n}.ckpt" for n in (2, 4, 5)]


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_killed_anywhere_in_a_save_leaves_a_whole_checkpoint(
    tiny_policy_dir: Path, tmp_path: Path, strategy: str
) -> None:
    run_scripts(HERE / "killed_save.py", [[str(tiny_policy_dir), str(tmp_path / "runs"), strategy]])
    survivors = []
    for run in sorted((tmp_path / "runs").iterdir()):
        found = latest(run / "checkpoints")
        assert found is not None, f"nothing is left after a kill at point {run.name}"
        survivors.append(found.name)
        module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
        options = {} if strategy == "auto" else {"strategy": strategy}
        data = SmallData(tiny_policy_dir, [[0, 1], [2, 3]])
        try:
            train(module, data, ckpt_path=str(found), default_root_dir=tmp_path / "resumed", **options)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        assert module.trainer.global_step == 2
    # Killed early the first checkpoint is the newest one, then the second; the last run was not killed.
    assert survivors == sorted(survivors)
    assert set(survivors) == {f"batch-0000000{n}.ckpt" for n in (1, 2)}


def test_torn_checkpoints_are_passed_over(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(every_n_batches=1, keep=9))
    folder = tmp_path / "checkpoints"
    newest = folder / "batch-00000005.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (folder / "batch-00000009.ckpt").mkdir()
    assert latest(folder).name == "batch-00000004.ckpt"
    assert latest(tmp_path / "nowhere") is None


def test_going_on_from_an_older_checkpoint_follows_the_new_attempt(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(every_n_batches=1, keep=9))
    older = tmp_path / "checkpoints" / "batch-00000002.ckpt"

    class Seen(Callback):
        """What lies in the folder when the first batch is done and nothing is saved yet."""

        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 3:
                self.names = names(tmp_path)

    seen = Seen()
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.02))
    train(
        module,
        SmallData(tiny_policy_dir, BATCHES[:4]),
        ckpt_path=str(older),
        enable_checkpointing=True,
        callbacks=[RunCheckpoint(every_n_batches=2, keep=2), seen],
        default_root_dir=tmp_path,
    )
    assert seen.names[-1] == "batch-00000005.ckpt"
    assert names(tmp_path) == ["batch-00000002.ckpt", "batch-00000004.ckpt"]
    newest = torch.load(latest(tmp_path / "checkpoints"), weights_only=True)
    assert newest["global_step"] == 4
    assert newest["optimizer_states"][0]["param_groups"][0]["lr"] == 0.02


def test_killed_between_two_attempts_leaves_the_one_gone_on_from(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(every_n_batches=1, keep=9))
    older = tmp_path / "checkpoints" / "batch-00000002.ckpt"
    replace = os.replace

    def killed(source: Path, destination: Path) -> None:
        if "doomed" not in Path(destination).name:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
            options = {"callbacks": [RunCheckpoint(every_n_batches=1)], "default_root_dir": tmp_path}
            data = SmallData(tiny_policy_dir, BATCHES)
            train(module, data, ckpt_path=str(older), enable_checkpointing=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert latest(tmp_path / "checkpoints") == older


class Interrupt(Callback):
    """Sends this process a signal in the middle of the third batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_before_optimizer_step(self, trainer: Trainer, module: RLHFModule, optimizer: object) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.number)


def test_ctrl_c_saves_after_the_batch_and_stops(tiny_policy_dir: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            fit(tiny_policy_dir, tmp_path, RunCheckpoint(), Interrupt(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    assert names(tmp_path) == ["batch-00000003.ckpt"]


def test_sigterm_saves_after_the_batch_and_stops(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tiny_policy_dir, tmp_path, RunCheckpoint(), Interrupt(signal.SIGTERM))
    assert names(tmp_path) == ["batch-00000003.ckpt"]


def test_after_a_divergence_the_last_checkpoint_is_finite(tiny_policy_dir: Path, tmp_path: Path) -> None:
    class Diverging(SFTModule):
        def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 3 else 1.0)
            self.step.check(loss)
            return loss

    with pytest.raises(TrainingDiverged):
        fit(tiny_policy_dir, tmp_path, RunCheckpoint(every_n_batches=1), module=Diverging(str(tiny_policy_dir)))
    newest = latest(tmp_path / "checkpoints")
    assert newest.name == "batch-00000003.ckpt"
    saved = torch.load(newest, weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_a_disk_without_room_is_told_before_the_first_step(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SFTModule(str(tiny_policy_dir))
    data = SmallData(tiny_policy_dir, [[0, 1]])
    room = {"free": 0}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=room["free"]))
    refused = pytest.raises(InputError, match=r"0.0 GB of the disk are free, and a checkpoint and the model take")
    with refused:
        train(module, data, callbacks=[RunCheckpoint()], default_root_dir=str(tmp_path), enable_checkpointing=True)
    assert module.trainer.global_step == 0
    # Weights and two moments in float32, and the model in 16 bits.
    room["free"] = 14 * sum(parameter.numel() for parameter in module.parameters())
    module = SFTModule(str(tiny_policy_dir))
    train(module, data, callbacks=[RunCheckpoint()], default_root_dir=str(tmp_path), enable_checkpointing=True)
    assert module.trainer.global_step == 1
