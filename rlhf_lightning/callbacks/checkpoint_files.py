"""Checkpoints on the disk: written beside their place, listed with their hashes, checked before they are loaded.

A checkpoint is a file, or a folder of shards. Its manifest, JSON, has the size and the SHA-256 of every file: within a
folder ``manifest.json``, beside a file ``NAME.ckpt.manifest.json``. The checkpoint gets its name last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlhf_lightning.models.replacing import flush

_STAGING = ".staging-"
_DOOMED = f"{_STAGING}doomed-"
_MANIFEST = "manifest.json"


class PlainFiles(TorchCheckpointIO):
    """Writes a staged checkpoint straight to its path, which need not be atomic, and all others as Lightning does.

    Lightning stages where temporary files go. That place may be another disk, and too small; it also holds the
    checkpoint a second time in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises OSError where the disk is full or read-only."""
        if not Path(path).name.startswith(_STAGING):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


def staging(destination: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return destination.with_name(f"{_STAGING}{destination.name}")


def clear_staging(folder: Path) -> None:
    """Removes what killed saves have left. A checkpoint that was set aside comes back if there is no other."""
    if not whole(folder):
        for aside in filter(is_whole, folder.glob(f"{_DOOMED}batch-*.ckpt")):
            os.replace(aside, folder / aside.name.removeprefix(_DOOMED))
    for leftover in folder.glob(f"{_STAGING}*"):
        delete(leftover)
    for manifest in folder.glob(f"*.{_MANIFEST}"):
        if not manifest.with_name(manifest.name.removesuffix(f".{_MANIFEST}")).exists():
            manifest.unlink()


def list_files(staged: Path, destination: Path) -> int:
    """Writes the manifest of a staged checkpoint, beside it or in it; returns the checkpoint's bytes."""
    with ThreadPoolExecutor(8) as pool:  # hashing leaves the interpreter's lock free
        described = dict(pool.map(_described, _files(staged)))
    listed = {destination.name if staged.is_file() else name: entry for name, entry in described.items()}
    manifest = manifest_of(staged)
    manifest.write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
    flush(manifest)
    return sum(entry["bytes"] for entry in listed.values())


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.name, {"bytes": path.stat().st_size, "sha256": digest}


def _files(checkpoint: Path) -> list[Path]:
    if not checkpoint.is_dir():
        return [checkpoint]
    return [path for path in sorted(checkpoint.iterdir()) if path.name != _MANIFEST]


def manifest_of(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint lies, or will lie."""
    return checkpoint / _MANIFEST if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{_MANIFEST}")


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, compared with its manifest; empty if nothing is.

    A file without a manifest (Lightning's own, say) is compared with the checksums that a zip file has.
    """
    manifest = manifest_of(checkpoint)
    if not manifest.exists():
        return f"it has no {_MANIFEST}" if checkpoint.is_dir() else _broken_zip(checkpoint)
    try:
        listed: dict[str, Any] = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        found = {path.name: path for path in _files(checkpoint)}
        if missing := sorted(listed.keys() - found.keys()):
            return f"{missing[0]} is missing"
        if strange := sorted(found.keys() - listed.keys()):
            return f"{strange[0]} is not in its manifest"
        for name, entry in listed.items():
            told, size = "it" if found[name] == checkpoint else name, found[name].stat().st_size
            if size != entry["bytes"]:
                return f"{told} has {size:,} bytes of {entry['bytes']:,}"
            if _described(found[name])[1]["sha256"] != entry["sha256"]:
                return f"{told} has changed since it was written"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest.name} cannot be read"
    return ""


def _broken_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
        return "" if part is None else f"its part {part} is damaged"
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        return f"it cannot be read ({error})"


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is complete: a file has its index at the end, a folder of shards the files written last."""
    if path.is_dir():
        return (path / "meta.pt").is_file() and (path / ".metadata").is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def whole(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a run's ``checkpoints`` folder, the oldest first."""
    folder = Path(folder)
    return sorted(path for path in folder.glob("batch-*.ckpt") if is_whole(path)) if folder.is_dir() else []


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, a file or folder, in a run's ``checkpoints`` folder; None if there is none."""
    return next(reversed(whole(folder)), None)


def newest_intact(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with each newer one."""
    wrong: list[str] = []
    for path in reversed(whole(folder)):
        if not (said := damage(path)):
            return path, wrong
        wrong.append(f"{path.name}: {said}")
    return None, wrong


def batches_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name: the batches of the run that it comes after."""
    digits = checkpoint.stem.removeprefix("batch-")
    return int(digits) if digits.isdecimal() else 0


def set_aside(path: Path) -> Path:
    """Renames a checkpoint, so that a half-deleted folder is not taken for one. The next save deletes leftovers."""
    doomed = path.with_name(f"{_DOOMED}{path.name}")
    if doomed.exists():
        delete(doomed)
    os.replace(path, doomed)
    if doomed.is_file():
        manifest_of(path).unlink(missing_ok=True)
    return doomed


def delete(path: Path) -> None:
    """Removes a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
