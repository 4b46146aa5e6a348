"""Gives Lightning one process's share of the batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.batching import epoch_batches, in_order, make_bins, share
from rlhf_lightning.data.collate import Batch, collate, column_names
from rlhf_lightning.data.mixing import make_slots, stepped_rows
from rlhf_lightning.data.tokenization import Example

if TYPE_CHECKING:
    from rlhf_lightning.data.datamodule import PreferenceDataModule


class Loader:
    """Iterates over one process's batches. It is no ``DataLoader``, so that Lightning adds no sampler of its own."""

    def __init__(self, data: PreferenceDataModule, training: bool) -> None:
        assert data.view is not None, "prepare() comes first"
        self.data = data
        self.training = training
        self.examples = data.train if training else data.held_out
        stepped = training and data.view.steps is not None
        self.steps = data.view.steps if stepped else None
        size = data.batch_size if training else data.val_batch_size
        self.slots = make_slots(self.examples, data.weights if training else {})
        self.bins = [] if stepped else make_bins(self.slots, size, data.batch_tokens)
        self.columns = column_names(data.train + data.held_out)
        self.pad_id = data.pad_id
        # Decided from all rows, not from the rows of this process, so that all processes agree.
        self.demonstrated = data.kind == "prompts" and any(example.responses for example in self.examples)

    def __len__(self) -> int:
        """The number of batches in a whole epoch, also if the run was resumed in the middle of one."""
        return self.steps if self.steps is not None else sum(map(len, self.bins))

    def __iter__(self) -> Iterator[Batch]:
        # The body runs at the first `next`. By then Lightning has restored its progress; at `iter` it has not.
        epoch, start, rank, world = self._place()
        order = [] if self.steps is not None else self._order(epoch)
        for number in range(start, len(self)):
            rows = [self.slots[i].row(self.data.seed, epoch, i) for i in order[number]] if order else []
            batch = [self.examples[row] for row in rows] or self._stepped(epoch, number)
            yield collate(share(batch, rank, world), self.data.kind, self.pad_id, self.columns, self.demonstrated)

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the Trainer knows the position. Lightning resumes only loaders that have this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see ``state_dict``."""

    def _order(self, epoch: int) -> list[tuple[int, ...]]:
        return epoch_batches(self.bins, self.data.seed, epoch) if self.training else in_order(self.bins)

    def _stepped(self, epoch: int, number: int) -> list[Example]:
        rows = stepped_rows(self.slots, self.data.batch_size, self.data.seed, epoch * len(self) + number)
        return [replace(self.examples[row], row=i) for i, row in rows]

    def _place(self) -> tuple[int, int, int, int]:
        """Epoch, first batch, rank and world size."""
        trainer = self.data.trainer
        if trainer is None:
            return 0, 0, 0, 1
        if not self.training:
            return 0, 0, trainer.global_rank, trainer.world_size
        loop: Any = trainer.fit_loop
        epoch, done = loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready
        return epoch, done, trainer.global_rank, trainer.world_size
