"""Which rows a process takes in which minibatch, without a Trainer: the permutation, the layout, the micro-batches."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.training.minibatches import flags_of_all, micro_rounds, minibatches


def rows_of(weighted: list[int], number: int, group: int, world: int, *counters: int) -> list[set[int]]:
    """Each minibatch as the numbers that its rows have in the whole iteration, by what each process takes."""
    counted = torch.tensor(weighted)
    parts = [list(minibatches(counted, number, group, world, rank, *counters)) for rank in range(world)]
    found = []
    for shares in zip(*parts, strict=True):
        numbers = set()
        for rank, own in enumerate(shares):
            numbers |= {(r // group * world + rank) * group + r % group for r in own.tolist()}
        found.append(numbers)
    return found


def test_every_weighted_row_is_in_one_minibatch() -> None:
    weighted = [1, 0, 1, 1, 1, 1, 0, 1, 1, 1]
    found = rows_of(weighted, 3, 1, 1, 0, 0, 0)
    assert sorted(row for part in found for row in part) == [0, 2, 3, 4, 5, 7, 8, 9]
    assert [len(part) for part in found] == [3, 3, 2]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_minibatches_are_the_same_for_any_number_of_processes(group: int, world: int) -> None:
    weighted = [int(n % 5 != 3) for n in range(12 * group)]
    rows = sorted(row for part in rows_of(weighted, 4, group, world, 7, 2, 1) for row in part)
    assert rows == [n for n, counted in enumerate(weighted) if counted]
    assert rows_of(weighted, 4, group, world, 7, 2, 1) == rows_of(weighted, 4, group, 1, 7, 2, 1)


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "iteration", "epoch"])
def test_each_seed_iteration_and_epoch_has_a_permutation_of_its_own(other: tuple[int, int, int]) -> None:
    everything = [1] * 40
    first = rows_of(everything, 4, 1, 1, 0, 0, 0)
    assert first == rows_of(everything, 4, 1, 1, 0, 0, 0)
    assert first != rows_of(everything, 4, 1, 1, *other)


def test_flags_of_all_processes_stand_in_the_order_of_the_prompts() -> None:
    """Prompts 0 and 2 lie with process 0, prompt 1 with process 1; two rows to each."""
    shares = [torch.tensor([True, False, True, True]), torch.tensor([False, True])]
    kept: list[torch.Tensor] = []
    for rank, own in enumerate(shares):
        flags_of_all(own, 2, 2, rank, 4, lambda flags: kept.append(flags) or flags)
    assert (kept[0] + kept[1]).tolist() == [1, 0, 0, 1, 1, 1, 0, 0]


def test_micro_rounds_cover_the_rows_within_the_budget_and_report() -> None:
    sizes, rows, told = torch.tensor([3, 9, 2, 4, 7]), torch.tensor([4, 0, 2, 1]), []
    parts = list(micro_rounds(sizes, rows, 10, "update", lambda *args: told.append(args)))
    assert sorted(row for part, _, _ in parts for row in part.tolist()) == [0, 1, 2, 4]
    assert all(len(part) * int(sizes[part].max()) <= 10 for part, _, _ in parts)
    assert [last for _, _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert told[-1] == ("update", len(parts), len(parts))


def test_without_rows_row_0_stands_for_them_uncounted() -> None:
    ((part, counted, last),) = micro_rounds(torch.tensor([3, 2]), torch.tensor([], dtype=torch.int64), 10, "update")
    assert part.tolist() == [0] and not counted and last
