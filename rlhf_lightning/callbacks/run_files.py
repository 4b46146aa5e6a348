"""Where a run writes, and the writing that survives being killed."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rlhf_lightning.models.export import flush


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run: the first logger's, or ``default_root_dir`` without one. Every process must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line; NaN and infinities, which JSON does not have, become null.

    Raises: OSError, and the file ends where it did: half a line would spoil the next one too.
    """
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half a surrogate pair, which JSON texts can spell, is in no UTF-8 file.
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


def rewind_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after ``last_step``: a resumed run writes them again. A torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # not splitlines(): JSON text may hold U+2028
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):  # a torn line may end within a character, too
            continue
    staged = path.with_name(path.name + ".staged")
    staged.write_bytes(b"".join(kept))
    os.replace(staged, path)


def logged_step(trainer: Trainer) -> int:
    """The number that Lightning gives the metrics of the current batch: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def sync_to_disk(path: Path) -> None:
    """fsync a file, or a folder and everything in it."""
    for part in [*(path.rglob("*") if path.is_dir() else []), path]:
        flush(part)
