"""Ensembles of rewards against Coste et al. 2023 by hand and by Python's statistics."""

import statistics

import pytest
import torch
from test_rewards import Constant, make_rollout

from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards import Ensemble, FunctionReward, WeightedSum

MEMBERS = [[1.0, 5.0, -2.5], [3.0, 5.0, 0.25], [8.0, 5.0, 7.0]]

AGGREGATES = {
    "mean": lambda r, c: statistics.mean(r),
    "worst": lambda r, c: min(r),
    "variance": lambda r, c: statistics.mean(r) - c * statistics.pvariance(r),
    "deviation": lambda r, c: statistics.mean(r) - c * statistics.pstdev(r),
}


@pytest.mark.parametrize("coefficient", [None, 0.3])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_score_is_the_papers(aggregate, coefficient):
    if coefficient is not None and aggregate in ("mean", "worst"):
        with pytest.raises(InputError, match=f"ensemble coefficient: 0.3 has no effect on aggregate {aggregate}"):
            Ensemble([Constant(m) for m in MEMBERS], aggregate, coefficient)
        return
    reward = Ensemble([Constant(m) for m in MEMBERS], aggregate, coefficient)
    weight = 1.0 if coefficient is None else coefficient
    expected = [AGGREGATES[aggregate](list(scores), weight) for scores in zip(*MEMBERS, strict=True)]
    torch.testing.assert_close(reward(make_rollout(["a", "b", "c"])), torch.tensor(expected))


def test_disagreement_is_the_deviation_of_the_members():
    reward = Ensemble([Constant([1.0, 5.0]), Constant([3.0, 5.0])], "mean")
    reward(make_rollout(["a", "b"]))
    torch.testing.assert_close(reward.noted["disagreement"], torch.tensor([1.0, 0.0]))


def test_a_response_that_a_member_skips_has_no_score(tmp_path):
    (tmp_path / "f.py").write_text("def odd(prompts, responses):\n    return [1 / (len(r) % 2) for r in responses]\n")
    members = [Constant([1.0, 2.0]), FunctionReward(f"{tmp_path / 'f.py'}:odd", on_error="skip")]
    for reward in (Ensemble(members, "worst"), WeightedSum(members, [1.0, 1.0])):
        assert reward.may_skip
        scores = reward(make_rollout(["a", "bb"]))
        assert torch.isfinite(scores).tolist() == [True, False]
    assert not Ensemble([Constant([1.0]), Constant([2.0])]).may_skip


def test_all_members_are_asked_before_an_error_is_raised():
    asked = []

    class Asked(Constant):
        def forward(self, rollout):
            asked.append(self.scores)
            return self.scores

    with pytest.raises(InputError, match="each of 2 responses, got shape \\(1,\\)"):
        Ensemble([Asked([1.0]), Asked([1.0, 2.0])])(make_rollout(["a", "b"]))
    assert asked == [[1.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        (1, {}, "ensemble rewards: expected two or more members, got 1"),
        (2, {"aggregate": "median"}, "ensemble aggregate: expected mean, worst, deviation or variance, got 'median'"),
        (2, {"coefficient": -1.0}, "ensemble coefficient: expected a number from 0, got -1.0"),
        (2, {"coefficient": float("nan")}, "ensemble coefficient: expected a number from 0, got nan"),
    ],
)
def test_options_that_cannot_work_are_refused(members, options, message):
    with pytest.raises(InputError, match=message):
        Ensemble([Constant([1.0])] * members, **options)
