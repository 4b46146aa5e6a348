"""Win rates against hand numbers, coverage by simulation, and the length-controlled one where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.evaluation.winrate import fit_logistic, length_controlled_win_rate, preferences, win_rate


def test_preferences_count_a_tie_as_half() -> None:
    got = preferences(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0]))
    assert got.tolist() == [1.0, 0.5, 0.0]


def test_wilson_interval_by_hand() -> None:
    # p = 8/10, z = 1.96: center (0.8 + 0.19208) / 1.38416 = 0.71674, half 1.96 / 1.38416 * sqrt(0.016 + 0.009604)
    result = win_rate(torch.tensor([1.0] * 8 + [0.0] * 2), z=1.96)
    assert result.value == pytest.approx(0.8)
    assert result.low == pytest.approx(0.71674 - 0.22658, abs=2e-5)
    assert result.high == pytest.approx(0.71674 + 0.22658, abs=2e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_interval_of_a_clean_sweep_is_within_the_unit_and_not_a_point(value: float) -> None:
    result = win_rate(torch.full((30,), value))
    assert 0.0 <= result.low <= value <= result.high <= 1.0
    assert result.high - result.low > 0.05


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60))
@settings(max_examples=60)
def test_swapping_the_policies_mirrors_the_win_rate(outcomes: list[float]) -> None:
    there, back = win_rate(torch.tensor(outcomes)), win_rate(1 - torch.tensor(outcomes))
    assert there.value == pytest.approx(1 - back.value)
    assert there.low == pytest.approx(1 - back.high, abs=1e-12)
    assert 0 <= there.low <= there.value <= there.high <= 1


@pytest.mark.parametrize(("win", "tie"), [(0.9, 0.0), (0.6, 0.3), (0.5, 0.0), (0.97, 0.02)])
def test_interval_covers_the_true_rate_at_least_nominally(win: float, tie: float) -> None:
    generator = torch.Generator().manual_seed(5)
    draws = torch.rand(3000, 100, generator=generator, dtype=torch.float64)
    outcomes = torch.where(draws < win, 1.0, torch.where(draws < win + tie, 0.5, 0.0))
    truth = win + tie / 2
    covered = sum((r := win_rate(row)).low <= truth <= r.high for row in outcomes) / len(outcomes)
    # Wilson's coverage wavers around 95% (0.93 at worst at this size); ties only widen it.
    assert covered >= (0.925 if tie == 0 else 0.95)


def simulate(theta: float, phi: float, count: int, seed: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Preferences drawn from the very model that is fitted, with longer answers from A on average."""
    generator = torch.Generator().manual_seed(seed)
    lengths_b = torch.randint(20, 200, (count,), generator=generator).double()
    lengths_a = lengths_b + 40 + 60 * torch.randn(count, generator=generator, dtype=torch.float64)
    difference = lengths_a - lengths_b
    chance = torch.sigmoid(theta + phi * torch.tanh(difference / difference.std(correction=0)))
    return (torch.rand(count, generator=generator, dtype=torch.float64) < chance).double(), lengths_a, lengths_b


@pytest.mark.parametrize(("theta", "phi"), [(0.0, 2.0), (1.0, 1.0), (-0.5, 0.0)])
def test_length_control_recovers_the_rate_at_equal_length(theta: float, phi: float) -> None:
    result = length_controlled_win_rate(*simulate(theta, phi, 20_000))
    truth = 1 / (1 + math.exp(-theta))
    assert result.value == pytest.approx(truth, abs=0.015)
    assert result.high - result.low < 0.04


def test_length_controlled_interval_covers_the_true_rate() -> None:
    truth, runs = 1 / (1 + math.exp(-0.8)), 300
    results = [length_controlled_win_rate(*simulate(0.8, 1.5, 200, seed)) for seed in range(runs)]
    # 95% nominal; 300 runs see a share below 0.915 once in two hundred times.
    assert sum(r.low < truth < r.high for r in results) / runs >= 0.915


def test_length_control_unmasks_a_policy_that_is_only_longer() -> None:
    outcomes, lengths_a, lengths_b = simulate(0.0, 3.0, 4000)
    assert win_rate(outcomes).low > 0.6
    controlled = length_controlled_win_rate(outcomes, lengths_a, lengths_b)
    assert controlled.low < 0.5 < controlled.high


def test_length_control_mirrors_when_the_policies_are_swapped() -> None:
    outcomes, lengths_a, lengths_b = simulate(0.7, 1.5, 500)
    there = length_controlled_win_rate(outcomes, lengths_a, lengths_b)
    back = length_controlled_win_rate(1 - outcomes, lengths_b, lengths_a)
    assert there.value == pytest.approx(1 - back.value, abs=1e-9)
    assert there.low == pytest.approx(1 - back.high, abs=1e-9)


def test_length_control_exists_when_one_policy_always_wins() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (2, 100), generator=generator)
    result = length_controlled_win_rate(torch.ones(100), lengths[0], lengths[1])
    assert 0.99 < result.value < 1.0
    assert result.low > 0.5


def test_length_control_with_equal_lengths_is_the_win_rate() -> None:
    outcomes = torch.tensor([1.0, 1.0, 0.5, 0.0])
    lengths = torch.tensor([3, 5, 7, 9])
    assert length_controlled_win_rate(outcomes, lengths, lengths) == win_rate(outcomes)


def test_length_control_refuses_to_guess_from_one_constant_difference() -> None:
    lengths = torch.tensor([3, 5, 7, 9])
    assert math.isnan(length_controlled_win_rate(torch.ones(4), lengths + 4, lengths).value)


def test_logistic_fit_is_where_an_independent_gradient_is_zero() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    y = torch.rand(200, generator=generator, dtype=torch.float64).round()
    weights, covariance = fit_logistic(x, y, ridge=0.5)
    w = weights.clone().requires_grad_()

    def objective(w: Tensor) -> Tensor:
        likelihood = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="sum")
        return likelihood + 0.25 * w.square().sum()

    (gradient,) = torch.autograd.grad(objective(w), w)
    assert gradient.abs().max() < 1e-8
    hessian = torch.autograd.functional.hessian(objective, weights)
    torch.testing.assert_close(covariance @ hessian, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preferences(torch.ones(3), torch.ones(2)), "one length"),
        (lambda: preferences(torch.tensor([float("nan")]), torch.ones(1)), "finite"),
        (lambda: win_rate(torch.tensor([])), "preference"),
        (lambda: win_rate(torch.tensor([2.0])), r"\[0, 1\]"),
        (lambda: length_controlled_win_rate(torch.ones(2), torch.ones(3), torch.ones(3)), "lengths"),
        (lambda: fit_logistic(torch.ones(2, 1), torch.ones(2), 0.0), "ridge"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
