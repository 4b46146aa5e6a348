"""Running moments against Python's statistics over everything that was counted."""

import random
import statistics

import pytest
import torch

from rlhf_lightning.algorithms.running import RunningMoments


def test_moments_of_many_updates_are_those_of_all_numbers():
    random.seed(0)
    moments, seen = RunningMoments(), []
    for rows in (1, 5, 3, 8, 2):
        numbers = [random.gauss(1e6, 0.5) for _ in range(rows)]  # far from 0, where sums of squares lose everything
        mask = [random.random() < 0.7 for _ in range(rows)]
        moments.update(torch.tensor(numbers, dtype=torch.float64), torch.tensor(mask))
        seen += [number for number, counted in zip(numbers, mask, strict=True) if counted]
    assert moments.count == len(seen)
    assert moments.mean == pytest.approx(statistics.mean(seen), rel=1e-14)
    assert moments.variance == pytest.approx(statistics.pvariance(seen), rel=1e-8)
    x = torch.tensor([seen[0], seen[1]], dtype=torch.float64)
    expected = [(value - statistics.mean(seen)) / statistics.pstdev(seen) for value in seen[:2]]
    assert moments.normalise(x).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_state_restores_exactly_and_nothing_counted_changes_nothing():
    moments = RunningMoments()
    moments.update(torch.tensor([0.1, 0.2, torch.nan]), torch.tensor([True, True, False]))
    before = moments.state()
    moments.update(torch.tensor([torch.nan]), torch.tensor([False]))
    assert moments.state() == before
    assert RunningMoments(**before) == moments


def test_one_number_becomes_zero():
    moments = RunningMoments()
    moments.update(torch.tensor([3.0]), torch.tensor([True]))
    assert moments.normalise(torch.tensor([3.0])).item() == 0.0
