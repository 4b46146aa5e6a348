"""Finds the folder of a run, and writes files that stay valid if the process is killed."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rlhf_lightning.models.replacing import flush


def run_folder(trainer: Trainer) -> Path:
    """The run's folder: the first logger's, or ``default_root_dir`` without loggers. Every process must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON line. NaN and infinities, which JSON does not have, become null.

    Raises: OSError. The file is then cut back to its old end, since half a line would spoil the next one, too.
    """
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON texts can spell half a surrogate pair, which UTF-8 cannot encode.
    line = (json.dumps(clean, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def rewind_lines(path: Path, steps: int) -> None:
    """Keeps the whole lines of the first ``steps`` steps; a resumed run writes the others again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines(): JSON text may hold U+2028
        try:
            if json.loads(line)["step"] < steps:
                lines.append(line + b"\n")
        except (ValueError, KeyError, TypeError):  # an incomplete line may even end within a character
            continue
    staged = path.with_name(path.name + ".staged")
    staged.write_bytes(b"".join(lines))
    os.replace(staged, path)


def logged_step(trainer: Trainer) -> int:
    """The step number under which Lightning logs the current batch: the batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def sync_to_disk(path: Path) -> None:
    """Calls fsync for a file, or for a folder and everything in it."""
    for part in [*(path.rglob("*") if path.is_dir() else []), path]:
        flush(part)
