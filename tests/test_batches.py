"""Batches move as a whole, masks come from lengths, and micro-batches keep to their budget."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, length_mask, micro_batches


def side() -> DemonstrationBatch:
    return DemonstrationBatch(
        torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 1]), torch.tensor([1, 1]), torch.ones(2)
    )


def test_masks_come_from_lengths():
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]
    assert side().mask.tolist() == [[True] * 3, [True, False, False]]


def test_a_batch_moves_with_the_batches_in_it_and_is_not_changed():
    batch = PreferenceBatch(side(), side(), torch.zeros(2), torch.ones(2))
    moved = batch.to("meta")
    assert moved.chosen.tokens.device.type == "meta"
    assert moved.margins.device.type == "meta"
    assert batch.chosen.tokens.device.type == "cpu"
    assert len(moved) == 2


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    sizes = torch.tensor(lengths, dtype=torch.int64)
    groups = micro_batches(sizes, budget)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * int(sizes[group].max()) <= budget
    longest = [int(sizes[group].max()) for group in groups]
    assert longest == sorted(longest, reverse=True)
