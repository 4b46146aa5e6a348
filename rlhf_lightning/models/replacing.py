"""Puts a model's folder into the place of an older one, whole or not at all, with all that its user has put there."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_lightning.errors import InputError
from rlhf_lightning.outputs import lock

# The files that exports write; whatever else stands in a model's folder is its user's.
_OWN = re.compile(
    r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)|(pytorch_)?model\.(safetensors|bin)\.index\.json|README\.md|"
    r"(generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|(special_tokens_map|added_tokens|vocab)\.json|"
    r"vocab\.txt|merges\.txt|chat_template\.(jinja|json)|spiece\.model|additional_chat_templates"
)


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write to; it takes the place of ``folder`` when the block ends without an error.

    Raises:
        InputError: ``folder`` is a file, or has files but no config.json: it is somebody's, and not a model.
    """
    folder = place_of(folder)
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_beside(folder)
    staged, replaced = beside(folder, "new"), beside(folder, "old")
    staged.mkdir()
    held = [lock(staged)]  # others who export to the same place leave it alone
    try:
        yield staged
        _keep_others(folder, staged)
        for path in [*staged.rglob("*"), staged]:
            if not path.is_symlink() and (path.is_file() or path.is_dir()):
                flush(path)
        stood = folder.exists()
        if stood:
            held.append(lock(folder))
            folder.rename(replaced)
        try:
            staged.rename(folder)
        except BaseException:
            if stood:
                replaced.rename(folder)
            raise
        flush(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for descriptor in filter(None, held):
            os.close(descriptor)


def place_of(folder: str | Path) -> Path:
    """Where a model's folder is: a link stays one, and what it leads to is replaced."""
    return Path(folder).resolve() if Path(folder).is_symlink() else Path(folder)


def beside(folder: Path, what: str) -> Path:
    """Where this process writes before a folder gets its name, or sets an old one aside."""
    return folder.with_name(f".{folder.name}.export.{what}-{os.getpid()}")


def clear_beside(folder: Path) -> None:
    """Removes what killed exports have left beside a folder. A model that was set aside comes back if there is none."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.export.*-*"):
        if not left.is_dir() or (held := lock(left)) is None:
            continue
        try:
            if ".export.old-" in left.name and not folder.exists():
                left.rename(folder)
            else:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(held)


def _keep_others(folder: Path, staged: Path) -> None:
    """Takes what a user has put into a model's folder over to the new one, without a copy where links can be made."""

    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError:  # a file system without links
            shutil.copy2(source, destination, follow_symlinks=False)

    for path in folder.iterdir() if folder.exists() else ():
        if _OWN.fullmatch(path.name) or (staged / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, staged / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(staged / path.name))


def check_free(folder: Path) -> None:
    """Raises an InputError where something stands that is not a model."""
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: something that is not a model stands here: move it, or choose another folder")


def flush(path: Path) -> None:
    """fsync a file, or a folder so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
