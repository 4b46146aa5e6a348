"""A toy module that notes the rows it is given, and the runs that the resume and process tests compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from chat_tokenizer import make_tokenizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rlhf_lightning.batches import PromptBatch, View
from rlhf_lightning.data.datamodule import PreferenceDataModule


class Notes(LightningModule):
    """Notes ``(epoch, batch, sorted row texts of positive weight)`` for every step."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.data_view = view
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Any] = []
        self.validated: list[Any] = []

    def rows(self, batch: Any) -> list[Any]:
        if isinstance(batch, PromptBatch):
            found = list(zip(batch.rows.tolist(), batch.prompts, batch.weights.tolist(), strict=True))
        else:
            side = getattr(batch, "chosen", batch)
            texts = [row[:n].tolist() for row, n in zip(side.tokens, side.lengths, strict=True)]
            found = list(zip(texts, batch.weights.tolist(), strict=True))
        return sorted(row[:-1] for row in found if row[-1] > 0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append([self.current_epoch, batch_idx, self.rows(batch)])
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += self.rows(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.rows(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint after training batch ``batch`` of epoch ``epoch``, or at that epoch's end."""

    def __init__(self, path: str, epoch: int, batch: int | None) -> None:
        self.path, self.epoch, self.batch = path, epoch, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if self.batch is None and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def make_data(path: str, **options: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(path, **{"batch_size": 4, "seed": 3, **options})
    data.tokenizer = make_tokenizer()
    return data


def make_trainer(**options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
    }
    return Trainer(**{**defaults, **options})


def write_rows(path: Path, count: int = 27) -> str:
    words = ["hello", "world", "how", "are", "you", "user", "fine", "thank"]
    rows = [
        {"prompt": f"{i} {words[i % 8]}", "chosen": " ".join(words[: 1 + i % 8]), "rejected": "no"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main(path: str, out: str, checkpoint: str, rank: str, port: str) -> None:
    """One of two processes: a whole run that saves after batch 2, then a resumed one; notes what this rank saw."""
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", NODE_RANK=rank, LOCAL_RANK="0")
    options = {"strategy": "ddp", "num_nodes": 2, "max_epochs": 2}
    whole = Notes(View("pairs"))
    make_trainer(**options, callbacks=[SaveAt(checkpoint, 0, 2)]).fit(whole, datamodule=make_data(path))
    resumed = Notes(View("pairs"))
    make_trainer(**options).fit(resumed, datamodule=make_data(path), ckpt_path=checkpoint)
    notes = {"whole": whole.seen, "resumed": resumed.seen, "validated": whole.validated}
    Path(f"{out}.{rank}").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(*sys.argv[1:])
