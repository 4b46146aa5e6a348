"""Run folders: ``runs/<run>/`` holds everything that one run leaves."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

from rlhf_lightning.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Lightning starts the other processes of a run by the same command line, some seconds later; this is how they learn the
# name that the first one took.
_SHARED_NAME = "RLHF_LIGHTNING_RUN"


def run_name(given: str | None, module: str) -> str:
    """The name given by ``--run``, checked, or a new one: the module and the time (``ppo-20260131-142501``)."""
    if given is not None:
        if not _NAME.fullmatch(given):
            raise InputError(
                f"--run {given}: use letters, digits, dots, dashes, underscores; it names a folder in runs/"
            )
        return given
    if os.environ.get("LOCAL_RANK", "0") != "0" and _SHARED_NAME in os.environ:
        return os.environ[_SHARED_NAME]
    stage = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", module.removesuffix("Module")).lower()
    name = f"{stage}-{datetime.now():%Y%m%d-%H%M%S}"
    os.environ[_SHARED_NAME] = name
    return name


def check_unused(folder: Path) -> None:
    """InputError where the folder holds a run already: a fit never writes over one."""
    left = next((name for name in ("checkpoints", "model", "metrics.jsonl") if (folder / name).exists()), None)
    if left is not None:
        raise InputError(
            f"{folder} holds a run already ({left}); continue it with --ckpt_path last, choose another name with "
            "--run, or remove the folder"
        )


def remove_if_nothing_logged(folder: Path) -> None:
    """Remove the folder of a run that ended before its first step was logged: it holds its config and no event."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    if files and all(file.name == "config.yaml" or file.name.startswith("events.out.tfevents.") for file in files):
        for file in files:
            file.unlink()
        folder.rmdir()
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
