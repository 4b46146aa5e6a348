"""A DataModule with fixed small rows, dealt out as the real one does, and a way to train on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rlhf_lightning.batches import DemonstrationBatch, LabelledBatch, PreferenceBatch
from rlhf_lightning.collectives import rank, world_size
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.sharding import full_state_dict


@dataclass
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float
    weight: float


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Random ids of words (4 to 50), EOS (1) at the end of every response; lengths and weights differ."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(4, 50, (length,), generator=draw).tolist()

    return [
        Pair(ids(1, 6), [*ids(1, 8), 1], [*ids(1, 8), 1], 0.25 * (i % 3), 1.0 + 0.5 * (i % 2)) for i in range(count)
    ]


def desirable(number: int) -> bool:
    """The label of row ``number``, where rows are labelled: its chosen response, called good or not."""
    return number % 3 > 0


def log_prob(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Of the response, summed over its tokens: the plainest way, with gradient."""
    ids = torch.tensor([prompt + response])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return log_probs[-len(response) :].sum()


def side(rows: list[Pair], name: str, weights: Tensor, extra: int) -> DemonstrationBatch:
    sequences = [row.prompt + getattr(row, name) for row in rows]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    # Padding with an id that is also a word: nothing may depend on it.
    tokens = torch.full((len(rows), int(lengths.max()) + extra), 7)
    for index, sequence in enumerate(sequences):
        tokens[index, : len(sequence)] = torch.tensor(sequence)
    return DemonstrationBatch(tokens, lengths, torch.tensor([len(row.prompt) for row in rows]), weights)


class Loader:
    """Starts its first pass where the checkpoint was made; its length stays that of an epoch."""

    def __init__(self, data: SmallData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.data.start = self.data.start, 0
        for numbers in self.data.batches[start:]:
            yield self.data.collate(numbers)

    def state_dict(self) -> dict[str, int]:
        return {}  # the DataModule has it; a loader with this method is resumable to Lightning

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to restore here."""


class SmallData(LightningDataModule):
    """``batches`` hold the row numbers of each global batch; process r takes every world-th row from the r-th.

    ``labelled``: instead of pairs, their chosen responses with labels, see `desirable`.
    """

    def __init__(
        self,
        folder: str | Path,
        batches: list[list[int]],
        extra: int = 0,
        held_out: bool = False,
        labelled: bool = False,
    ) -> None:
        super().__init__()
        self.labelled = labelled
        self.tokenizer = load_tokenizer(folder)
        self.pairs = make_pairs(24)
        self.batches = batches
        self.extra = extra
        self.held_out = held_out
        self.start = 0

    def collate(self, numbers: list[int]) -> Any:
        mine = numbers[rank() :: world_size()]
        weights = torch.tensor([self.pairs[n].weight for n in mine] or [0.0])
        rows = [self.pairs[n] for n in mine] or [self.pairs[0]]
        chosen = side(rows, "chosen", weights, self.extra)
        if self.trainer.lightning_module.data_view.kind == "demonstrations":
            return chosen
        if self.labelled:
            return LabelledBatch(chosen, torch.tensor([desirable(n) for n in mine] or [False]))
        margins = torch.tensor([row.margin for row in rows])
        return PreferenceBatch(chosen, side(rows, "rejected", weights, self.extra), margins, weights)

    def train_dataloader(self) -> Loader:
        return Loader(self)

    def state_dict(self) -> dict[str, int]:
        return {"start": self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]

    def val_dataloader(self) -> DataLoader | list[Any]:
        return (
            DataLoader([list(range(8)), list(range(8, 13))], batch_size=None, collate_fn=self.collate)
            if self.held_out
            else []
        )


def train(module: Any, data: SmallData, ckpt_path: str | None = None, **options: Any) -> dict[str, Tensor]:
    """The trained weights, whole, on process 0."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(**{**defaults, "devices": 1, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in full_state_dict(module.model).items()}
