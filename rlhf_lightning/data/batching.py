"""Decides which rows form which batch: global batches first, the same for any number of processes, then rank shares.

Rows are sorted by length and put into bins. Every epoch distributes the rows of a bin over its batches anew, and
shuffles the batches of all bins. So the rows of a batch have similar lengths, and the mix changes from epoch to epoch.
The number of batches never changes, because Lightning asks for it only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, PromptBatch
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.collate import Batch, collate, column_names
from rlhf_lightning.data.records import Records
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder, Example
from rlhf_lightning.errors import InputError
from rlhf_lightning.randomness import DATA_ORDER, permutation

_BATCHES_PER_BIN = 8  # with more, a batch mixes lengths more widely and needs more padding


class Sized(Protocol):
    """An item of a bin: an example, or a slot that several examples take in turns."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of tokens of each sequence."""

    @property
    def record(self) -> Record:
        """The row that messages name."""


@dataclass(frozen=True)
class Bin:
    """Rows of similar length, and how many of them one batch takes."""

    rows: tuple[int, ...]
    batch_size: int

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.rows) // self.batch_size)


def make_bins(examples: Sequence[Sized], batch_size: int, batch_tokens: int | None) -> list[Bin]:
    """Bins from the longest rows to the shortest.

    Args:
        examples: all rows.
        batch_size: most rows in a batch.
        batch_tokens: most tokens in a batch, padding included: rows times the longest row; a pair counts both sides.

    Raises:
        InputError: a single row has more than ``batch_tokens`` tokens.
    """
    order = sorted(range(len(examples)), key=lambda i: (-sum(examples[i].widths), i))
    for i in order:
        if batch_tokens is not None and sum(examples[i].widths) > batch_tokens:
            raise InputError(
                f"{examples[i].record.where}: {sum(examples[i].widths)} tokens in one row are over data.batch_tokens "
                f"{batch_tokens}; raise it, or lower data.max_prompt_tokens and data.max_response_tokens"
            )
    bins = []
    start = 0
    while start < len(order):
        size = batch_size
        if batch_tokens is not None:
            size = max(1, min(size, batch_tokens // sum(examples[order[start]].widths)))
            while size > 1 and size * _width(examples, order[start : start + size * _BATCHES_PER_BIN]) > batch_tokens:
                size -= 1
        rows = order[start : start + size * (_BATCHES_PER_BIN if size > 1 else 1)]
        bins.append(Bin(tuple(rows), size))
        start += len(rows)
    return bins


def _width(examples: Sequence[Sized], rows: Sequence[int]) -> int:
    """The tokens, padding included, that one row takes in a batch of these rows."""
    return sum(map(max, zip(*(examples[i].widths for i in rows), strict=True)))


def epoch_batches(bins: Sequence[Bin], seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The row numbers of every global batch of one epoch, in order: a pure function of its arguments."""
    batches = []
    for number, bin in enumerate(bins):
        order = permutation(len(bin.rows), seed, DATA_ORDER, epoch, number + 1).tolist()
        rows = [bin.rows[i] for i in order]
        batches += [tuple(rows[i : i + bin.batch_size]) for i in range(0, len(rows), bin.batch_size)]
    return [batches[i] for i in permutation(len(batches), seed, DATA_ORDER, epoch, 0).tolist()]


def in_order(bins: Sequence[Bin]) -> list[tuple[int, ...]]:
    """Every row once, unshuffled, for evaluation."""
    return [bin.rows[i : i + bin.batch_size] for bin in bins for i in range(0, len(bin.rows), bin.batch_size)]


def endless_batch(size: int, batch_size: int, seed: int, number: int) -> tuple[int, ...]:
    """Batch ``number`` of an endless walk over ``size`` rows: pass after pass, each in a new order.

    A batch may reach into the next pass and take a row twice. The second time, ``size`` is added to the row's number,
    so that all numbers in a batch differ. The row is the number modulo ``size``.
    """
    places = range(number * batch_size, (number + 1) * batch_size)
    orders = {p: permutation(size, seed, DATA_ORDER, p).tolist() for p in {place // size for place in places}}
    taken: dict[int, int] = {}
    numbers = []
    for place in places:
        row = orders[place // size][place % size]
        numbers.append(row + size * taken.get(row, 0))
        taken[row] = taken.get(row, 0) + 1
    return tuple(numbers)


def share(batch: Sequence[Example], rank: int, world: int) -> list[Example]:
    """Rows ``rank::world`` of a global batch. A rank left without rows gets the first row with weight 0 as a filler."""
    return list(batch[rank::world]) or [replace(batch[0], weight=0.0)]


def demonstration_batches(
    records: Records, tokenizer: Any, batch_size: int, batch_tokens: int | None = None, **options: Any
) -> list[DemonstrationBatch]:
    """Prompts with their best responses; longest first. ``options`` are those of ``Encoder``."""
    return cast(
        list[DemonstrationBatch], _batches(records, tokenizer, "demonstrations", batch_size, batch_tokens, options)
    )


def preference_batches(
    records: Records, tokenizer: Any, batch_size: int, batch_tokens: int | None = None, **options: Any
) -> list[PreferenceBatch]:
    """All pairs; longest first. ``options`` are those of ``Encoder``."""
    return cast(list[PreferenceBatch], _batches(records, tokenizer, "pairs", batch_size, batch_tokens, options))


def prompt_batches(
    records: Records, tokenizer: Any, batch_size: int, batch_tokens: int | None = None, **options: Any
) -> list[PromptBatch]:
    """Each distinct prompt once; longest first. ``PromptBatch.rows`` gives the file's order."""
    return cast(list[PromptBatch], _batches(records, tokenizer, "prompts", batch_size, batch_tokens, options))


def _batches(
    records: Records, tokenizer: Any, kind: Kind, batch_size: int, batch_tokens: int | None, options: dict[str, Any]
) -> list[Batch]:
    encoder = Encoder(tokenizer, **options)
    examples: Sequence[Example] = encoder.encode(records.rows, kind)[0]
    columns = column_names(examples)
    order = in_order(make_bins(examples, batch_size, batch_tokens))
    return [collate([examples[i] for i in rows], kind, encoder.pad_id, columns) for rows in order]
