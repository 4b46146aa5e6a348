"""The losses against numbers worked out by hand, and what must hold for any numbers."""

from __future__ import annotations

import itertools
import math

import choix
import numpy as np
import pytest
import torch

from rlhf_lightning.algorithms.losses import (
    bradley_terry_loss,
    log_odds,
    negative_log_likelihood,
    odds_ratio_loss,
    preference_loss,
    token_shares,
)

F = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_likelihood_sums_counted_tokens_and_ignores_the_rest() -> None:
    log_probs = torch.tensor([[-1.0, -2.5, math.nan], [-0.5, -1.0, -4.0]], dtype=F)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert negative_log_likelihood(log_probs, mask).tolist() == [3.5, 5.0]


def test_bradley_terry_by_hand() -> None:
    # sigmoid(ln 3) = 3/4; at equal scores the loss is ln 2; with margin 1, 3 - 1 - 1 = 1.
    loss = bradley_terry_loss(tensor(math.log(3.0), 2.0, 3.0), tensor(0.0, 2.0, 1.0), tensor(0.0, 0.0, 1.0))
    torch.testing.assert_close(loss, tensor(-math.log(0.75), math.log(2.0), softplus(-1.0)))


def test_bradley_terry_label_smoothing_is_the_mean_over_both_labels() -> None:
    loss = bradley_terry_loss(tensor(math.log(3.0)), tensor(0.0), label_smoothing=0.1)
    torch.testing.assert_close(loss, tensor(-0.9 * math.log(0.75) - 0.1 * math.log(0.25)))


def test_bradley_terry_with_soft_labels_is_the_cross_entropy() -> None:
    ahead = tensor(math.log(3.0), math.log(3.0), 0.0, -2.0)
    p = tensor(1.0, 0.6, 0.5, 0.9)
    loss = bradley_terry_loss(ahead, torch.zeros_like(ahead), preferences=p)
    expected = [-math.log(0.75), -0.6 * math.log(0.75) - 0.4 * math.log(0.25), math.log(2.0)]
    torch.testing.assert_close(loss[:3], tensor(*expected))
    torch.testing.assert_close(loss[3], 0.9 * tensor(softplus(2.0))[0] + 0.1 * tensor(softplus(-2.0))[0])
    # With label smoothing each label is wrong with probability 0.1: p becomes 0.8 p + 0.1.
    smoothed = bradley_terry_loss(ahead, torch.zeros_like(ahead), label_smoothing=0.1, preferences=p)
    torch.testing.assert_close(smoothed, bradley_terry_loss(ahead, torch.zeros_like(ahead), preferences=0.8 * p + 0.1))
    certain = bradley_terry_loss(ahead, torch.zeros_like(ahead), label_smoothing=0.1)
    ones = torch.ones_like(p)
    loss = bradley_terry_loss(ahead, torch.zeros_like(ahead), label_smoothing=0.1, preferences=ones)
    torch.testing.assert_close(loss, certain)


def test_soft_labels_give_the_utilities_that_choix_finds() -> None:
    """Shares of wins as soft labels, weighted by the number of comparisons, have the likelihood of the comparisons."""
    draw = np.random.default_rng(0)
    truth, pairs = draw.normal(size=6), list(itertools.combinations(range(6), 2))
    won = {pair: draw.binomial(40, 1 / (1 + math.exp(truth[pair[1]] - truth[pair[0]]))) for pair in pairs}
    comparisons = [pair for pair in pairs for _ in range(won[pair])]
    comparisons += [pair[::-1] for pair in pairs for _ in range(40 - won[pair])]
    expected = choix.opt_pairwise(6, comparisons, alpha=0)
    scores = torch.zeros(6, dtype=F, requires_grad=True)
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    shares = torch.tensor([won[pair] / 40 for pair in pairs], dtype=F)
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 40 * bradley_terry_loss(scores[first], scores[second], preferences=shares).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (scores - scores.mean()).detach().numpy()
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-4)


def test_bradley_terry_centring_adds_the_squared_sum() -> None:
    plain = bradley_terry_loss(tensor(2.0), tensor(0.5))
    torch.testing.assert_close(bradley_terry_loss(tensor(2.0), tensor(0.5), centring=0.01), plain + 0.01 * 6.25)


def test_bradley_terry_is_free_up_to_a_constant_and_stays_finite() -> None:
    chosen, rejected = torch.randn(2, 50, dtype=F)
    torch.testing.assert_close(bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected))
    extreme = bradley_terry_loss(tensor(-1e4, 1e4), tensor(1e4, -1e4))
    torch.testing.assert_close(extreme, tensor(2e4, 0.0))


def test_dpo_sigmoid_by_hand() -> None:
    # beta h = 0.1 * (5 - (-5)) = 1.
    torch.testing.assert_close(preference_loss(tensor(5.0), tensor(-5.0), 0.1), tensor(softplus(-1.0)))
    smoothed = preference_loss(tensor(5.0), tensor(-5.0), 0.1, "sigmoid", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, tensor(0.8 * softplus(-1.0) + 0.2 * softplus(1.0)))


def test_ipo_by_hand_and_at_its_optimum() -> None:
    # (h - 1 / (2 * 0.25))^2 = (3 - 2)^2; least where the gap is 1 / (2 beta).
    torch.testing.assert_close(preference_loss(tensor(2.0), tensor(-1.0), 0.25, "ipo"), tensor(1.0))
    torch.testing.assert_close(preference_loss(tensor(2.0), tensor(-1.0), 0.25, "ipo_sum"), tensor(1.0))
    assert preference_loss(tensor(2.0), tensor(0.0), 0.25, "ipo").item() == 0.0


def test_hinge_by_hand() -> None:
    loss = preference_loss(tensor(4.0, 20.0, -4.0), tensor(0.0, 0.0, 0.0), 0.1, "hinge")
    torch.testing.assert_close(loss, tensor(0.6, 0.0, 1.4))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "ipo_sum", "hinge"])
def test_a_better_separated_pair_has_the_smaller_loss_up_to_the_target(kind: str) -> None:
    gaps = torch.linspace(-3.0, 1.0, 20, dtype=F)
    losses = preference_loss(gaps, torch.zeros_like(gaps), 0.5, kind)
    assert (losses.diff() < 0).all()


def test_at_the_reference_the_sigmoid_gradient_is_half_beta() -> None:
    ratios = torch.zeros(1, dtype=F, requires_grad=True)
    preference_loss(ratios, torch.zeros(1, dtype=F), 0.3).sum().backward()
    torch.testing.assert_close(ratios.grad, tensor(-0.15))


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("token", (1 + 2 + 3 + 10) / 4),  # four tokens
        ("sequence", ((1 + 2 + 3) / 3 + 10) / 2),  # two responses; the third has no token
        ("constant", ((1 + 2 + 3) / 8 + 10 / 8) / 2),
    ],
)
def test_the_normalisations_of_a_mean_over_tokens(normalisation, expected) -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 90.0, 90.0], [90.0, 90.0, 90.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    shares = token_shares(mask, normalisation, 8)
    assert ((losses * shares.weights).sum() / shares.total).item() == pytest.approx(expected)
    # Both add up over parts of the batch.
    parts = [token_shares(mask[rows], normalisation, 8) for rows in ([0], [1, 2])]
    assert sum(part.total for part in parts) == shares.total
    assert torch.equal(torch.cat([part.weights for part in parts]), shares.weights)


def test_log_odds_by_hand() -> None:
    p = tensor(0.5, 0.9, 1e-9)
    torch.testing.assert_close(log_odds(p.log()), tensor(0.0, math.log(9.0), math.log(1e-9) + 1e-9))


def test_a_certain_response_leaves_the_odds_ratio_finite() -> None:
    certain = torch.zeros(1, requires_grad=True)  # float32: each token's probability rounds to 1
    loss = odds_ratio_loss(certain, torch.tensor([-2.0])) + odds_ratio_loss(torch.tensor([-2.0]), certain)
    loss.sum().backward()
    assert loss.isfinite().all() and certain.grad.isfinite().all()
