"""Which rows are the best of their groups, and how far best-of-n moves a distribution that is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_lightning.rollout.best_of import best_of_kl, best_rows


def test_the_best_rows_of_each_group_in_order():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0])
    assert best_rows(scores, 3).tolist() == [[1], [3]]  # of two that tie the earlier
    assert best_rows(scores, 3, keep=2).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_kl_of_best_of_n_is_below_its_bound(count):
    """Five responses with distinct scores: the distribution of the best of n is enumerated."""
    policy = torch.tensor([0.1, 0.3, 0.25, 0.15, 0.2], dtype=torch.float64)
    best = torch.zeros(5, dtype=torch.float64)
    for drawn in itertools.product(range(5), repeat=count):
        best[max(drawn)] += policy[list(drawn)].prod()
    kl = (best * (best / policy).log()).sum().item()
    assert -1e-12 <= kl <= best_of_kl(count) + 1e-12


def test_the_bound_is_reached_where_no_response_comes_twice():
    responses = 2000  # equally likely: the k-th is the best of 2 with probability (2k - 1) / responses^2
    k = torch.arange(1, responses + 1, dtype=torch.float64)
    best = (2 * k - 1) / responses**2
    assert (best * (best * responses).log()).sum().item() == pytest.approx(best_of_kl(2), abs=1e-3)
    assert best_of_kl(2) == pytest.approx(math.log(2) - 0.5)
