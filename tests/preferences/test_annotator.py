"""The annotator's noise against its formula, and the best that can be done on its labels."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.annotator import SimulatedAnnotator

ROWS = torch.arange(20000)


def shares_above(annotator: SimulatedAnnotator, quality: list[float], i: int, j: int) -> float:
    ranks = annotator.rank(torch.tensor(quality).expand(len(ROWS), -1), ROWS)
    return float((ranks[:, i] < ranks[:, j]).double().mean())


@pytest.mark.parametrize("lapse", [0.0, 0.3])
def test_pairs_within_a_ranking_follow_bradley_terry(lapse: float) -> None:
    annotator = SimulatedAnnotator(temperature=0.5, lapse=lapse, seed=3)
    quality = [0.0, 0.4, -0.3]
    for i, j in ((0, 1), (1, 2), (2, 0)):
        seen = 1 / (1 + math.exp(-(quality[i] - quality[j]) / 0.5))
        expected = (1 - lapse) * seen + lapse / 2
        error = 4 * math.sqrt(expected * (1 - expected) / len(ROWS))
        assert shares_above(annotator, quality, i, j) == pytest.approx(expected, abs=error)
        assert float(annotator.preference(torch.tensor(quality[i]), torch.tensor(quality[j]))) == pytest.approx(
            expected
        )


def test_the_ceiling_is_what_a_model_that_knows_the_quality_gets() -> None:
    annotator = SimulatedAnnotator(temperature=1.0, lapse=0.1, seed=0)
    quality = torch.linspace(-2, 2, len(ROWS) * 2).reshape(-1, 2)[torch.randperm(len(ROWS))]
    quality[:, 1] = quality[:, 1].flip(0)
    ranks = annotator.rank(quality, ROWS)
    right = (ranks[:, 0] < ranks[:, 1]) == (quality[:, 0] > quality[:, 1])
    ceiling = annotator.label_ceiling([(a, b) for a, b in quality.tolist()])
    assert float(right.double().mean()) == pytest.approx(ceiling, abs=4 * 0.5 / math.sqrt(len(ROWS)))


def test_the_ceiling_by_hand() -> None:
    annotator = SimulatedAnnotator(temperature=1.0, lapse=0.2, seed=0)
    # Equal qualities are a coin toss; a difference of log 3 is seen with 3/4, and 0.8 * 0.75 + 0.1 = 0.7.
    assert annotator.label_ceiling([(1.0, 1.0)]) == pytest.approx(0.5)
    assert annotator.label_ceiling([(0.0, math.log(3)), (1.0, 1.0)]) == pytest.approx((0.7 + 0.5) / 2)
    with pytest.raises(ValueError, match="no pairs"):
        annotator.label_ceiling([])


def test_ranks_are_permutations_that_depend_on_seed_and_row_alone() -> None:
    quality = torch.zeros(50, 4)
    annotator = SimulatedAnnotator(temperature=1.0, lapse=0.0, seed=1)
    ranks = annotator.rank(quality, ROWS[:50])
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(1, 5).expand(50, 4))
    assert torch.equal(annotator.rank(quality[10:20], ROWS[10:20]), ranks[10:20])
    other = SimulatedAnnotator(temperature=1.0, lapse=0.0, seed=2).rank(quality, ROWS[:50])
    assert not torch.equal(other, ranks)


def test_a_clear_difference_is_seen() -> None:
    annotator = SimulatedAnnotator(temperature=0.1, lapse=0.0, seed=0)
    assert annotator.rank(torch.tensor([[1.0, 9.0, 5.0]]), ROWS[:1]).tolist() == [[3, 1, 2]]


@pytest.mark.parametrize(("temperature", "lapse"), [(0.0, 0.1), (1.0, 1.0), (1.0, -0.1)])
def test_impossible_noise_is_refused(temperature: float, lapse: float) -> None:
    with pytest.raises(InputError, match="annotator"):
        SimulatedAnnotator(temperature, lapse, seed=0)
