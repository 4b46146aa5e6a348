"""Checkpoints prove themselves: every kind of damage is found and named, and the one before is taken."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_data import SmallData, train
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from rlhf_lightning.callbacks import checkpoint_files
from rlhf_lightning.callbacks.checkpoint_files import damage, latest, newest_intact
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.distributed import strange_metadata
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.optimizer import AdamWOptions

BATCHES = [[0, 1], [2, 3], [4, 5]]


def fit(folder: Path, run: Path, *callbacks: Callback, **options: Any) -> None:
    module = SFTModule(str(folder), optimizer=AdamWOptions(learning_rate=0.01))
    options = {"enable_checkpointing": True, "default_root_dir": run, **options}
    callbacks = callbacks or (RunCheckpoint(every_n_batches=1, keep=9),)
    train(module, SmallData(folder, BATCHES), callbacks=list(callbacks), **options)


@pytest.fixture(scope="module")
def saved(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's folder of checkpoints: of files, and of folders of shards."""
    folders = {}
    for kind, strategy in (("file", "auto"), ("folder", "fsdp2")):
        run = tmp_path_factory.mktemp(kind)
        try:
            fit(tiny_policy_dir, run, strategy=strategy)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        folders[kind] = run / "checkpoints"
    return folders


@pytest.fixture(params=["file", "folder"])
def checkpoints(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[request.param], tmp_path / "checkpoints"))


def parts(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]


def test_what_was_written_is_intact(checkpoints: Path) -> None:
    names = sorted(path.name for path in checkpoints.glob("*.ckpt"))
    assert names == [f"batch-0000000{n}.ckpt" for n in (1, 2, 3)]
    manifests = sorted(path.name for path in checkpoints.glob("*.manifest.json"))
    assert manifests in ([], [f"{name}.manifest.json" for name in names])
    assert all(damage(checkpoints / name) == "" for name in names)
    assert newest_intact(checkpoints) == (checkpoints / names[-1], [])


def test_every_flipped_bit_is_found(checkpoints: Path) -> None:
    newest = latest(checkpoints)
    assert newest is not None
    draw = random.Random(0)
    for path in parts(newest):
        whole = path.read_bytes()
        for place in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            assert damage(newest), f"a flipped bit at byte {place} of {path.name} was not found"
        path.write_bytes(whole)
    assert damage(newest) == ""


def test_a_shorter_or_missing_part_is_found_and_the_one_before_is_taken(checkpoints: Path) -> None:
    newest = latest(checkpoints)
    assert newest is not None
    path = max(parts(newest), key=lambda part: part.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    told = "it" if path == newest else path.name
    assert damage(newest) == f"{told} has {len(whole) + 1:,} bytes of {len(whole):,}"
    found, wrong = newest_intact(checkpoints)
    assert found == checkpoints / "batch-00000002.ckpt"
    assert wrong == [f"{newest.name}: {damage(newest)}"]
    path.unlink()
    found, _ = newest_intact(checkpoints)
    assert found == checkpoints / "batch-00000002.ckpt"


def test_a_shard_of_an_older_checkpoint_is_found(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["folder"], tmp_path / "checkpoints"))
    shard = next(path.name for path in (folder / "batch-00000003.ckpt").glob("*.distcp"))
    shutil.copy(folder / "batch-00000002.ckpt" / shard, folder / "batch-00000003.ckpt" / shard)
    assert shard in damage(folder / "batch-00000003.ckpt")


def test_a_file_without_a_manifest_is_checked_by_its_zip_sums(saved: dict[str, Path], tmp_path: Path) -> None:
    alone = Path(shutil.copy(saved["file"] / "batch-00000003.ckpt", tmp_path / "alone.ckpt"))
    assert damage(alone) == ""
    whole = bytearray(alone.read_bytes())
    whole[len(whole) // 2] ^= 1
    alone.write_bytes(whole)
    assert "is damaged" in damage(alone)


class Run:
    """What a hostile pickle would do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_metadata_that_would_run_code_is_refused(saved: dict[str, Path], tiny_policy_dir: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved["folder"] / "batch-00000002.ckpt", tmp_path / "batch-00000002.ckpt"))
    assert strange_metadata(checkpoint) == ""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Run(tmp_path / "made")))
    assert "it asks for posix.mkdir" in strange_metadata(checkpoint)
    try:
        with pytest.raises(InputError, match=r"it asks for posix\.mkdir"):
            fit(tiny_policy_dir, tmp_path / "run", strategy="fsdp2", ckpt_path=str(checkpoint))
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "made").exists()


def test_a_shard_that_would_run_code_is_refused(saved: dict[str, Path], tiny_policy_dir: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved["folder"] / "batch-00000002.ckpt", tmp_path / "batch-00000002.ckpt"))
    hostile = io.BytesIO()
    torch.save(Run(tmp_path / "made"), hostile)
    (checkpoint / "hostile.distcp").write_bytes(hostile.getvalue())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.startswith("state_dict."))
    places = [index for index in metadata.storage_data if index.fqn == name]
    kind = type(metadata.storage_data[places[0]])
    for index in places:
        del metadata.storage_data[index]
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = kind("hostile.distcp", 0, len(hostile.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert strange_metadata(checkpoint) == ""
    try:
        with pytest.raises(InputError, match="a shard holds more than data"):
            fit(tiny_policy_dir, tmp_path / "run", strategy="fsdp2", ckpt_path=str(checkpoint))
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "made").exists()


def test_a_users_own_checkpoints_are_written_as_lightning_writes_them(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(), ModelCheckpoint(dirpath=tmp_path / "new" / "best", save_last=True))
    assert damage(tmp_path / "new" / "best" / "last.ckpt") == ""


def test_what_is_not_as_the_manifest_says_is_found(checkpoints: Path) -> None:
    newest = latest(checkpoints)
    assert newest is not None
    manifest = checkpoint_files.manifest_of(newest)
    if newest.is_dir():
        (newest / "stray.distcp").write_bytes(b"")
        assert damage(newest) == "stray.distcp is not in its manifest"
        (newest / "stray.distcp").unlink()
        manifest.rename(checkpoints / "elsewhere")
        assert damage(newest) == "it has no manifest.json"
        (checkpoints / "elsewhere").rename(manifest)
    manifest.write_text('{"files": {}}')
    assert "is not in its manifest" in damage(newest)
    manifest.write_text("{")
    assert damage(newest) == f"{manifest.name} cannot be read"


def test_a_checkpoint_that_was_set_aside_comes_back_if_it_is_the_only_one(checkpoints: Path) -> None:
    for path in checkpoint_files.whole(checkpoints):
        aside = checkpoint_files.set_aside(path)
        if path.name != "batch-00000003.ckpt":
            checkpoint_files.delete(aside)
    checkpoint_files.clear_staging(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["batch-00000003.ckpt"]
    assert damage(checkpoints / "batch-00000003.ckpt") == ""


def test_nothing_is_staged_where_temporary_files_go(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a temporary file")

    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    fit(tiny_policy_dir, tmp_path)
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "batch-00000003.ckpt"


def test_a_full_disk_is_one_line_and_leaves_the_one_before(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = torch.save, []

    def fill(value: Any, file: Any) -> None:
        saves.append(file)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, file)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(InputError, match=r"batch-00000002\.ckpt: .* \(No space left on device\); .*batch-00000001"):
        fit(tiny_policy_dir, tmp_path)
    assert damage(tmp_path / "checkpoints" / "batch-00000001.ckpt") == ""


class Leftovers(Callback):
    """What lies in the folder of checkpoints when the first batch begins."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 0:
            self.found = sorted(path.name for path in Path(trainer.default_root_dir, "checkpoints").iterdir())


def test_a_run_removes_what_a_killed_save_left(tiny_policy_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".staging-batch-00000007.ckpt").write_bytes(b"cut off")
    (folder / ".staging-doomed-batch-00000001.ckpt").mkdir()
    (folder / "batch-00000007.ckpt.manifest.json").write_text("{}")
    seen = Leftovers()
    fit(tiny_policy_dir, tmp_path, RunCheckpoint(), seen)
    assert seen.found == []
    assert checkpoint_files.whole(folder) == [folder / "batch-00000003.ckpt"]
