"""Dawid and Skene's model against the likelihood written down independently, and on simulated annotators."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from rlhf_lightning.preferences.dawid_skene import fit


def simulated(items: int, accuracies: list[float], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and one label of each annotator for each item."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, classes, items)
    counts = np.zeros((items, len(accuracies), classes))
    for a, accuracy in enumerate(accuracies):
        right = draw.random(items) < accuracy
        wrong = (truth + draw.integers(1, classes, items)) % classes
        counts[np.arange(items), a, np.where(right, truth, wrong)] = 1
    return truth, counts


def log_likelihood(counts: torch.Tensor, shares: torch.Tensor, confusion: torch.Tensor) -> torch.Tensor:
    """Sum over items of log sum over classes of p_c prod_a prod_l pi_acl^n_ial, term by term."""
    total = torch.zeros((), dtype=torch.float64)
    for item in counts:
        terms = []
        for c in range(len(shares)):
            term = torch.log(shares[c])
            for a, label in product(range(counts.shape[1]), range(counts.shape[2])):
                if item[a, label] > 0:
                    term = term + item[a, label] * torch.log(confusion[a, c, label])
            terms.append(term)
        total = total + torch.logsumexp(torch.stack(terms), 0)
    return total


def test_without_a_prior_it_is_a_maximum_of_the_likelihood() -> None:
    _, counts = simulated(60, [0.8, 0.7, 0.75, 0.6], 2, 0)
    found = fit(counts, prior=0.0)
    assert found.converged
    shares = torch.tensor(found.shares).log().requires_grad_()
    confusion = torch.tensor(found.confusion).log().requires_grad_()
    value = log_likelihood(torch.tensor(counts), shares.softmax(0), confusion.softmax(2))
    assert abs(float(value.detach()) - found.objective) < 1e-6
    value.backward()
    assert float(shares.grad.abs().max()) < 1e-3
    assert float(confusion.grad.abs().max()) < 1e-3
    # Any step away from it is worse.
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(5):
            moved = confusion + 0.1 * torch.randn(confusion.shape, generator=draw, dtype=torch.float64)
            assert log_likelihood(torch.tensor(counts), shares.softmax(0), moved.softmax(2)) < value


def test_the_posterior_is_bayes_rule() -> None:
    _, counts = simulated(20, [0.9, 0.6, 0.7], 3, 1)
    found = fit(counts)
    for item, posterior in zip(counts, found.posterior, strict=True):
        joint = [
            found.shares[c]
            * np.prod([found.confusion[a, c, label] ** item[a, label] for a in range(3) for label in range(3)])
            for c in range(3)
        ]
        np.testing.assert_allclose(posterior, np.array(joint) / sum(joint), atol=1e-5)


def test_it_learns_whom_to_believe_and_beats_the_majority() -> None:
    truth, counts = simulated(400, [0.95, 0.9, 0.6, 0.6, 0.6], 2, 2)
    found = fit(counts)
    assert np.argmax(found.accuracy()) == 0
    assert abs(found.accuracy()[0] - 0.95) < 0.05
    majority = np.mean(counts.sum(1).argmax(1) == truth)
    assert np.mean(found.posterior.argmax(1) == truth) > majority + 0.05


def test_one_judgement_of_an_annotator_does_not_overrule_the_others() -> None:
    counts = np.zeros((30, 3, 2))
    counts[:, :2, 0] = 1  # two people say the first, always
    counts[0, 2, 1] = 1  # a third says the second, once
    assert fit(counts).posterior[0, 0] > 0.9
    np.testing.assert_allclose(fit(counts).posterior.sum(1), 1)


def test_items_without_labels_follow_the_shares() -> None:
    _, counts = simulated(50, [0.9, 0.9], 2, 3)
    counts = np.concatenate([counts, np.zeros((1, 2, 2))])
    found = fit(counts)
    np.testing.assert_allclose(found.posterior[-1], found.shares, atol=1e-3)
