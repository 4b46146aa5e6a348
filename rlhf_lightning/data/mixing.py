"""Mixes files of different weights: decides how often each row comes in an epoch.

A weight says how often each row of its file comes in an epoch. Its whole part is exact. For its fraction f,
``round(f x n)`` of the file's n rows come once more. To choose them, the rows are sorted by length and cut into that
many runs of nearly equal size. Each epoch takes one row of each run, in a random order in which every row of a run
comes before any of them comes again. So all epochs have the same number of rows and batches, and the choice of rows is
a function of (seed, epoch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlhf_lightning.data.batching import endless_batch
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Example
from rlhf_lightning.errors import InputError
from rlhf_lightning.randomness import DATA_ORDER, permutation

_FRACTIONS = 1 << 20  # separates these draws from the draws of the bins


@dataclass(frozen=True)
class Slot:
    """A place in every epoch, with the rows that take turns in it. Most slots have one row."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]  # for each sequence, the most tokens that it has in any of the rows
    record: Record  # the record of the longest row

    def row(self, seed: int, epoch: int, number: int) -> int:
        """The row in this slot, the ``number``-th of all slots, in an epoch."""
        size = len(self.rows)
        if size == 1:
            return self.rows[0]
        order = permutation(size, seed, DATA_ORDER, epoch // size, _FRACTIONS + number)
        return self.rows[int(order[epoch % size])]


def make_slots(examples: Sequence[Example], weights: Mapping[str, float]) -> list[Slot]:
    """The slots of an epoch: one for each row, or as many as the weight of the row's file asks for.

    Args:
        examples: all rows.
        weights: the weight of each file, after `check_weights`.
    """
    slots = []
    files = _by_file(examples)
    for path, rows in files.items():
        weight = weights.get(path, 1.0)
        whole, runs = _parts(weight, len(rows))
        slots += [_slot(examples, [row]) for _ in range(whole) for row in rows]
        ordered = sorted(rows, key=lambda i: (-sum(examples[i].widths), i))
        cuts = [run * len(rows) // runs for run in range(runs + 1)] if runs else []
        slots += [_slot(examples, ordered[start:end]) for start, end in pairwise(cuts)]
    return slots


def check_weights(examples: Sequence[Example], weights: Mapping[str, float]) -> list[str]:
    """The files that have a weight but no row left.

    Raises:
        InputError: a file's weight is so low that none of its rows comes in an epoch.
    """
    files = _by_file(examples)
    for path, weight in weights.items():
        rows = len(files.get(path, ()))
        if rows and _parts(weight, rows) == (0, 0):
            raise InputError(
                f"data.path: {path}: a weight of {weight:g} takes none of {rows} rows; raise it "
                f"({1 / rows:.2g} is one row), or leave the file out"
            )
    return [path for path in weights if path not in files]


def stepped_rows(slots: Sequence[Slot], batch_size: int, seed: int, number: int) -> list[tuple[int, int]]:
    """Batch ``number`` of an endless walk over the slots, as pairs ``(number in the walk, row)``.

    The numbers within a batch differ, even if a row comes more than once. Each pass over the slots is an epoch.
    """
    size = len(slots)
    numbers = endless_batch(size, batch_size, seed, number)
    passes = [place // size for place in range(number * batch_size, (number + 1) * batch_size)]
    return [(i, slots[i % size].row(seed, epoch, i % size)) for i, epoch in zip(numbers, passes, strict=True)]


def asked_again(examples: Sequence[Example], weights: Mapping[str, float], batch_size: int) -> list[str]:
    """A line if a batch has more prompts than there are, so that prompts come more than once in it.

    Args:
        examples: all prompts to train on.
        weights: the weight of each file.
        batch_size: prompts in a global batch.
    """
    prompts = len(make_slots(examples, weights))
    if batch_size <= prompts:
        return []
    again = f"at least {batch_size - prompts:,} of them come again in it"
    return [
        f"each iteration takes data.batch_size {batch_size:,} prompts, and there are {prompts:,} to train on: {again}; "
        f"lower it to {prompts:,}, or give more prompts"
    ]


def file_weights(path: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The weights in ``data.path``; empty if it only names files.

    Raises:
        InputError: a weight is no number above 0.
    """
    if isinstance(path, str) and path.lstrip().startswith("{"):
        raise InputError(f"data.path: {path}: weights are numbers above 0, as in {{a.jsonl: 1, b.jsonl: 0.5}}")
    if not isinstance(path, Mapping):
        return {}
    for name, weight in path.items():
        if not 0 < weight < math.inf:
            raise InputError(f"data.path: {name}: a weight of {weight:g}; give a number above 0, or leave the file out")
    return {name: float(weight) for name, weight in path.items()}


def _by_file(examples: Sequence[Example]) -> dict[str, list[int]]:
    files: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        files.setdefault(example.record.where.rpartition(":")[0], []).append(i)
    return files


def _parts(weight: float, rows: int) -> tuple[int, int]:
    """How often every row comes in an epoch, and how many of the rows come once more."""
    return int(weight), round((weight - int(weight)) * rows)


def _slot(examples: Sequence[Example], rows: Sequence[int]) -> Slot:
    widths = tuple(map(max, zip(*(examples[row].widths for row in rows), strict=True)))
    return Slot(tuple(rows), widths, examples[rows[0]].record)
