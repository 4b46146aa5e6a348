"""``predict``: the responses as a JSONL file, one line a prompt, in the order of the prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.distributed import all_gather_objects
from rlhf_lightning.errors import InputError


def check_writable(path: Path) -> None:
    """InputError where the file cannot be written; asked before the work that its content takes."""
    if path.is_dir():
        raise InputError(f"--output {path}: this is a folder; name a file in it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--output {path}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--output {path}: no permission to write to {parent}; choose another place")


class PredictionWriter(Callback):
    """Collects the rows that ``predict_step`` returns, on all processes, and writes them once at the end.

    Args:
        path: the file to write. It appears whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep the batch's rows."""
        self._rows += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows to the first process, and write them in the order of the whole prompt set."""
        rows = [row for part in all_gather_objects(self._rows) for row in part]
        if not trainer.is_global_zero:
            return
        rows.sort(key=lambda row: row["row"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(f".{self.path.name}.tmp")
        with staged.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(staged, self.path)
        print(f"{len(rows)} responses in {self.path}")
