"""Run by test_checkpoints.py: trains and dies in the second save, once for every point of it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from small_data import SmallData, train

from rlhf_lightning.callbacks import checkpoints
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.optimizer import AdamWOptions


def die_at(point: int) -> None:
    """Count the steps that change something on the disk, from the second save on; die right before number ``point``."""
    passed = {"saves": 0, "steps": 0}

    def counted(module: Any, name: str, begins_save: bool = False) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            passed["saves"] += begins_save
            if passed["saves"] >= 2:
                if passed["steps"] == point:
                    os._exit(77)
                passed["steps"] += 1
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    counted(checkpoints, "staging", begins_save=True)
    counted(checkpoints, "list_files")
    counted(checkpoints, "sync_to_disk")
    counted(os, "replace")
    counted(checkpoints, "flush")
    counted(Path, "unlink")
    counted(shutil, "rmtree")


def train_and_die(model: str, run: str, strategy: str, point: int) -> None:
    die_at(point)
    options = {} if strategy == "auto" else {"strategy": strategy}
    train(
        SFTModule(model, optimizer=AdamWOptions(learning_rate=0.01)),
        SmallData(model, [[0, 1], [2, 3]]),
        default_root_dir=run,
        callbacks=[checkpoints.RunCheckpoint(every_n_batches=1, keep=1)],
        enable_checkpointing=True,
        **options,
    )


def main() -> None:
    """Every point in a child of its own, forked before torch has any threads."""
    model, runs, strategy = sys.argv[1:]
    torch.set_num_threads(1)
    for point in range(40):
        child = os.fork()
        if child == 0:
            train_and_die(model, f"{runs}/{point:02d}", strategy, point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(f"point {point}: {code}", flush=True)
        if code != 77:
            sys.exit(code)


if __name__ == "__main__":
    main()
