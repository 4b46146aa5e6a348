"""Counter-based draws: uniform, apart from each other, and a function of their counters alone."""

import torch

from rlhf_lightning.randomness import DATA_ORDER, SAMPLING, permutation, uniform


def test_draws_do_not_depend_on_the_batch():
    rows = torch.arange(100)
    together = uniform(3, SAMPLING, 7, rows, 2)
    alone = torch.stack([uniform(3, SAMPLING, 7, int(row), 2) for row in rows])
    assert torch.equal(together, alone)


def test_every_counter_matters():
    base = uniform(1, SAMPLING, 2, 3, 4)
    others = [(0, SAMPLING, 2, 3, 4), (1, DATA_ORDER, 2, 3, 4), (1, SAMPLING, 1, 3, 4), (1, SAMPLING, 2, 4, 3)]
    assert all(uniform(*other) != base for other in others)


def test_draws_are_uniform_inside_the_open_interval():
    draws = uniform(0, SAMPLING, 0, torch.arange(200_000), 0)
    assert draws.min() > 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert chi_square < 148.2  # the 99.9% point of chi-square with 99 degrees of freedom


def test_neighbouring_counters_are_uncorrelated():
    draws = uniform(0, SAMPLING, torch.arange(300)[:, None], torch.arange(300)[None, :]) - 0.5
    for shifted in (draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]):
        # The product of two independent centred uniforms has deviation 1/12.
        assert abs(shifted.mean().item()) < 4 / 12 / shifted.numel() ** 0.5


def test_permutations_are_permutations():
    order = permutation(50, 0, DATA_ORDER, 1)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != permutation(50, 0, DATA_ORDER, 2).tolist()
    first = torch.stack([permutation(4, seed, DATA_ORDER) for seed in range(2000)])[:, 0]
    assert all(abs((first == i).sum().item() - 500) < 100 for i in range(4))  # five deviations


def test_known_values():
    """Draws are part of what a seed means: they must not change between releases."""
    assert uniform(0, SAMPLING, 0, 0, 0).item() == 0.3579092707199366
    assert permutation(8, 0, DATA_ORDER, 2).tolist() == [2, 6, 7, 1, 0, 5, 4, 3]
