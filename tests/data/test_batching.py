"""Global batches: every row once, under the budget, of similar lengths, the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.batching import endless_batch, epoch_batches, in_order, make_bins, share
from rlhf_lightning.data.forms import Pair
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Example
from rlhf_lightning.errors import InputError


def example(row: int, prompt: int, *responses: int) -> Example:
    record = Record("p", (), (), f"f.jsonl:{row + 1}", Pair())
    ids = tuple(np.zeros(length, dtype=np.int32) for length in responses)
    return Example(np.zeros(prompt, dtype=np.int32), ids, 0.0, 1.0, row, record)


def padded_tokens(rows: list[Example]) -> int:
    return len(rows) * sum(max(row.widths[i] for row in rows) for i in range(len(rows[0].widths)))


_LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=120)


@settings(max_examples=150)
@given(lengths=_LENGTHS, batch_size=st.integers(1, 9), budget=st.none() | st.integers(180, 900), seed=st.integers(0, 9))
def test_each_epoch_has_every_row_once_within_the_limits(lengths, batch_size, budget, seed):
    examples = [example(i, *row) for i, row in enumerate(lengths)]
    bins = make_bins(examples, batch_size, budget)
    for batches in (epoch_batches(bins, seed, 0), epoch_batches(bins, seed, 1), in_order(bins)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
        assert len(batches) == sum(map(len, bins))
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert all(budget is None or padded_tokens([examples[i] for i in batch]) <= budget for batch in batches)
    assert epoch_batches(bins, seed, 1) == epoch_batches(bins, seed, 1)


def test_epochs_and_seeds_differ_in_order_and_in_mix():
    bins = make_bins([example(i, 5 + i % 7, 9) for i in range(64)], 4, None)
    first, second, other = epoch_batches(bins, 0, 0), epoch_batches(bins, 0, 1), epoch_batches(bins, 1, 0)
    assert first != second and first != other
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_grouping_by_length_pads_little():
    lengths = (torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 500 + 1).long().tolist()
    examples = [example(i, length) for i, length in enumerate(lengths)]
    batches = epoch_batches(make_bins(examples, 16, None), 0, 0)
    grouped = sum(padded_tokens([examples[i] for i in batch]) for batch in batches)
    as_they_come = sum(padded_tokens(examples[i : i + 16]) for i in range(0, 2000, 16))
    assert grouped < 1.1 * sum(lengths) and as_they_come > 1.7 * sum(lengths)


def test_a_row_over_the_budget_is_named():
    with pytest.raises(InputError, match=r"f.jsonl:2: 60 tokens in one row are over data.batch_tokens 50; raise it"):
        make_bins([example(0, 5, 5), example(1, 20, 40)], 4, 50)


@given(size=st.integers(1, 11), world=st.integers(1, 5))
def test_shares_add_up_to_the_batch_and_fillers_weigh_nothing(size, world):
    batch = [example(i, 3) for i in range(size)]
    shares = [share(batch, rank, world) for rank in range(world)]
    assert all(shares)
    assert sorted(row.row for rows in shares for row in rows if row.weight > 0) == list(range(size))
    assert sum(row.weight for rows in shares for row in rows) == size


@given(size=st.integers(1, 9), batch_size=st.integers(1, 12), seed=st.integers(0, 5))
def test_the_endless_walk_goes_round_all_rows(size, batch_size, seed):
    batches = [endless_batch(size, batch_size, seed, number) for number in range(3 * size)]
    walk = [row % size for batch in batches for row in batch]
    passes = [walk[i : i + size] for i in range(0, len(walk), size)]
    assert all(len(batch) == batch_size == len(set(batch)) for batch in batches)
    assert all(sorted(one) == list(range(size)) for one in passes)


def test_passes_of_the_endless_walk_differ():
    first, second = (endless_batch(50, 50, 0, number) for number in range(2))
    assert first != second and sorted(first) == sorted(second)
