"""Minibatches and micro-batches: which rows this process takes when, as pure functions.

Shapes: ``B`` rows of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_lightning.batches import micro_batches
from rlhf_lightning.collectives import rounds
from rlhf_lightning.errors import InputError
from rlhf_lightning.options import Options, PositiveFloat, PositiveInt
from rlhf_lightning.randomness import MINIBATCHES, permutation


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(Options):
    """The optimizer steps of an iteration.

    Args:
        epochs: passes over an iteration's responses.
        minibatches: optimizer steps in a pass.
        micro_batch_tokens: padded tokens in one forward pass at most: what bounds the memory. It does not change
            results.
        max_grad_norm: clip the gradient norm, of the policy and of a critic of its own each; None for no clipping.
    """

    epochs: PositiveInt = 1
    minibatches: PositiveInt = 1
    micro_batch_tokens: PositiveInt = 8192
    max_grad_norm: PositiveFloat | None = 1.0

    def check_rows(self, rows: int) -> None:
        """Raises an InputError if an iteration's ``rows`` do not make enough minibatches."""
        if rows < self.minibatches:
            raise InputError(
                f"model.update.minibatches: {self.minibatches} minibatches cannot be made of {rows} responses; raise "
                "data.batch_size or lower it"
            )


Report = Callable[[str, int, int], None]  # called with a phase, and how many of its parts are done


def silent(phase: str, done: int, total: int) -> None:
    """Reports to nobody."""


def micro_rounds(
    sizes: Tensor, rows: Tensor, budget: int, phase: str, report: Report = silent
) -> Iterator[tuple[Tensor, bool, bool]]:
    """The given rows in micro-batches, as (row numbers, whether they count, whether it is the last round).

    Every process makes as many, see `collectives.rounds`. A process without rows repeats its row 0, which then does not
    count.

    Args:
        sizes: ``[B]`` int64, tokens that each row puts into a forward pass.
        rows: int64 numbers of the rows to take.
        budget: padded tokens in a micro-batch at most.
        phase: what is reported.
        report: to whom.
    """
    groups = micro_batches(sizes[rows], budget)
    parts = list(rounds(len(groups)))
    for done, (number, real, last) in enumerate(parts):
        report(phase, done, len(parts))
        yield (rows[groups[number]] if real else rows.new_zeros(1)), real, last
    report(phase, len(parts), len(parts))


def minibatches(
    weighted: Tensor, number: int, group: int, world: int, rank: int, seed: int, iteration: int, epoch: int
) -> Iterator[Tensor]:
    """A pass over an iteration's rows: a fresh permutation, cut into minibatches, of which each process takes its rows.

    Prompt i of the iteration lies with process ``i % world``, and the rows to a prompt lie beside each other. The
    minibatches are the same for any number of processes.

    Args:
        weighted: ``[N]`` int64 or bool, which rows of all processes are learnt from, in the order of the prompts.
        number: minibatches.
        group: rows to each prompt.
        world: processes.
        rank: this one's number.
        seed, iteration, epoch: the permutation is a function of these.

    Yields: int64 numbers of this process's own rows, perhaps none.
    """
    rows = weighted.nonzero()[:, 0]
    order = rows[permutation(len(rows), seed, MINIBATCHES, iteration, epoch)]
    for minibatch in torch.tensor_split(order, number):
        prompts = minibatch // group
        yield (prompts // world * group + minibatch % group)[prompts % world == rank]


def flags_of_all(
    own: Tensor, group: int, world: int, rank: int, largest: int, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """This process's flags among those of all: ``[B]`` -> ``[N]`` int64 in the order of the prompts.

    Args:
        own: ``[B]`` bool.
        group: rows to each prompt.
        world: processes.
        rank: this one's number.
        largest: the most rows that a process has.
        reduce: adds tensors up over the processes.
    """
    local = torch.arange(len(own))
    numbers = (local // group * world + rank) * group + local % group
    flags = torch.zeros(largest * world, dtype=torch.int64)
    flags[numbers] = own.long().cpu()
    return reduce(flags)
