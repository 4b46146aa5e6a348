"""Where the score lands, what the KL costs, advantages of groups, explained variance: on rows worked by hand."""

import math

import pytest
import torch

from rlhf_lightning.algorithms.advantages import (
    discounted_returns,
    explained_variance,
    group_advantages,
    leave_one_out_advantages,
    token_rewards,
    varied_groups,
)

KL = torch.tensor([[0.5, 1.0, 2.0], [1.0, float("nan"), 9.0], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0]])
SCORES = torch.tensor([10.0, 20.0, 30.0, 40.0])
LENGTHS = torch.tensor([3, 1, 0, 2])
TRUNCATED = torch.tensor([True, False, False, False])
WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.0])


def test_the_score_is_on_the_last_counted_token():
    rewards, mask = token_rewards(SCORES, KL, LENGTHS, TRUNCATED, WEIGHTS, kl_coef=0.1)
    expected = [[-0.05, -0.1, 9.8, 0], [19.9, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [False] * 4, [False] * 4]


def test_the_score_can_be_one_slot_after_eos():
    rewards, mask = token_rewards(SCORES, KL, LENGTHS, TRUNCATED, WEIGHTS, kl_coef=0.1, score_position="after_eos")
    # Row 0 was truncated: there is no EOS to come after. Row 1 ended by EOS.
    expected = [[-0.05, -0.1, 9.8, 0], [-0.1, 20, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert mask.tolist() == [[True] * 3 + [False], [True, True, False, False], [False] * 4, [False] * 4]


def test_no_kl_is_charged_after_the_response():
    rewards, _ = token_rewards(torch.zeros(4), KL, LENGTHS, TRUNCATED, WEIGHTS, kl_coef=1.0)
    assert torch.isfinite(rewards).all()
    assert rewards[1].tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_an_unknown_position_is_named():
    with pytest.raises(ValueError, match="first"):
        token_rewards(SCORES, KL, LENGTHS, TRUNCATED, WEIGHTS, 0.1, score_position="first")


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert explained_variance(returns, returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(torch.zeros(2, 2), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(returns / 2, returns, mask).item() == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns, torch.ones(2, 2), mask).item())


GROUPS = torch.tensor([1.0, 2.0, 3.0, 0.1, 0.1, 0.1])


def test_group_advantages_by_hand():
    # The first group has mean 2 and sample deviation 1; 0.1 has no exact float, and must still give nothing.
    torch.testing.assert_close(group_advantages(GROUPS, 3), torch.tensor([-1.0, 0, 1, 0, 0, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(group_advantages(4 * GROUPS, 3, scale=False), torch.tensor([-4.0, 0, 4, 0, 0, 0]))
    assert varied_groups(GROUPS, 3).tolist() == [True] * 3 + [False] * 3


def test_leave_one_out_advantages_by_hand():
    torch.testing.assert_close(leave_one_out_advantages(GROUPS, 3), torch.tensor([-1.5, 0, 1.5, 0, 0, 0]))
    torch.testing.assert_close(leave_one_out_advantages(GROUPS[:2], 2), torch.tensor([-1.0, 1.0]))


def test_discounted_returns_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 9.0], [5.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    torch.testing.assert_close(discounted_returns(rewards, mask, 0.5), torch.tensor([[3.0, 4, 4, 0], [5, 0, 0, 0]]))
