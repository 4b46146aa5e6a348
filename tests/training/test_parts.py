"""The held parts alone, without a Trainer: each number is worked out by hand or by float64 loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import JudgedResponses, KTOModule
from rlhf_lightning.modules.ppo import NewScores, PPOModule
from rlhf_lightning.modules.simpo import SimPOModule
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.training.credit import AdvantageOptions, CreditAssignment
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.experience import CriticExperience, Experience, ResponseScores
from rlhf_lightning.training.frozen_reference import FrozenReference
from rlhf_lightning.training.kl_control import KLController, KLOptions
from rlhf_lightning.training.objective import ClippedObjective, ObjectiveOptions
from rlhf_lightning.training.pairs import JudgedPairs, Rows
from rlhf_lightning.training.scoring import checked_scores, settle
from rlhf_lightning.training.totals import Totals

TOKENS = [3, 1, 2]  # response tokens of three rows, whose prompts have two
PADDED = 3
RATIOS = [[1.1, 0.5, 1.3], [0.9, 1.0, 1.0], [1.5, 0.7, 1.0]]
ADVANTAGES = [[1.0, 1.0, -2.0], [0.5, 0.0, 0.0], [2.0, -1.0, 0.0]]


def rollout(truncated: tuple[bool, ...] = (False, True, False), weights: tuple[float, ...] = (1, 1, 1)) -> Rollout:
    lengths = torch.tensor(TOKENS) + 2
    prompts = PromptBatch(
        tokens=torch.ones(3, 2, dtype=torch.int64),
        lengths=torch.full((3,), 2),
        rows=torch.arange(3),
        weights=torch.tensor(weights),
        prompts=["a", "b", "c"],
        columns={},
    )
    sampled = (torch.ones(3, 2 + PADDED, dtype=torch.int64), lengths, prompts.lengths, torch.zeros(3, PADDED))
    return Rollout(prompts, *sampled, torch.tensor(truncated), ["x", "y", "z"])


def old_scores(kl: float = 0.0, values: Tensor | None = None) -> ResponseScores:
    """Log-probs of -1 under the policy, and ``kl`` less under the reference."""
    log_probs = torch.full((3, PADDED), -1.0)
    return ResponseScores(log_probs, log_probs - kl, values)


# The KL penalty


@pytest.mark.parametrize(("estimator", "nats"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_the_penalty_of_a_token_and_of_a_response(estimator: Any, nats: float) -> None:
    controller, mask = KLController(KLOptions(estimator=estimator)), rollout().response_mask
    torch.testing.assert_close(controller.per_token(old_scores(0.5)), torch.full((3, 3), nats))
    torch.testing.assert_close(controller.per_response(old_scores(0.5), mask), nats * torch.tensor(TOKENS))


def test_the_coefficient_follows_the_target_and_goes_on_from_a_checkpoint() -> None:
    """Ziegler et al. 2019, section 2.2: the error is clipped at 0.2, and n responses of a horizon move it."""
    controller = KLController(KLOptions(coef=0.1, target=4.0, horizon=100.0))
    controller.adapt(4.4, 10)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    controller.adapt(400.0, 20)
    raised = 0.1 * 1.01 * (1 + 0.2 * 20 / 100)
    assert controller.coef == pytest.approx(raised)
    adaptive, fixed = (KLController(KLOptions(coef=0.3, target=target)) for target in (4.0, None))
    for other in (adaptive, fixed):
        other.load(controller.state())
    assert (adaptive.coef, fixed.coef) == (pytest.approx(raised), 0.3)


def test_updates_stop_past_the_bound_alone() -> None:
    bounded, free = KLController(KLOptions(stop=0.1)), KLController(KLOptions())
    assert [bounded.exceeds_stop(kl) for kl in (0.1, 0.11)] == [False, True]
    assert not free.exceeds_stop(1e9)


# Credit

VALUES = [[0.5, 0.2, -0.3, 0.9], [0.1, 0.4, 0.0, 0.0], [-0.2, 0.6, 0.8, 0.0]]


def gae_by_loops(rewards: list[list[float]], gamma: float, lam: float) -> list[list[float]]:
    """Schulman et al. 2015, equation 16, over each row's own tokens."""
    result = []
    for row, values, steps in zip(rewards, VALUES, TOKENS, strict=True):
        ahead, advantages = 0.0, [0.0] * PADDED
        for t in reversed(range(steps)):
            following = values[t + 1] if t + 1 < steps else 0.0
            ahead = row[t] + gamma * following - values[t] + gamma * lam * ahead
            advantages[t] = ahead
        result.append(advantages)
    return result


@pytest.mark.parametrize("bootstrap", [False, True])
def test_advantages_and_returns_are_those_of_the_definition(bootstrap: bool) -> None:
    gamma, lam, coef = 0.9, 0.8, 0.5
    options = AdvantageOptions(gamma=gamma, lam=lam, whiten=False, bootstrap_truncated=bootstrap)
    credit, values, scores = CreditAssignment(options), torch.tensor(VALUES), torch.tensor([2.0, 3.0, -1.0])
    kl = torch.full((3, PADDED), 0.2)
    rewards, states = credit.token_rewards(scores, kl, coef, rollout(), values)
    by_hand = [[-coef * 0.2] * steps for steps in TOKENS]
    earned = [2.0, gamma * VALUES[1][1] if bootstrap else 3.0, -1.0]  # row 1 is cut after its one token
    for row, last in zip(by_hand, earned, strict=True):
        row[-1] += last
    expected = gae_by_loops(by_hand, gamma, lam)
    mask = rollout().response_mask
    advantages, returns = credit.compute_advantages(rewards, values, states, mask)
    torch.testing.assert_close(advantages * mask, torch.tensor(expected))
    torch.testing.assert_close(returns[:, :-1] * mask, (torch.tensor(expected) + values[:, :-1]) * mask)


def test_the_critic_may_learn_by_a_lambda_of_its_own() -> None:
    values, scores = torch.tensor(VALUES), torch.tensor([2.0, 3.0, -1.0])
    credit = CreditAssignment(AdvantageOptions(lam=0.3, critic_lam=1.0, whiten=False))
    rewards, states = credit.token_rewards(scores, torch.zeros(3, PADDED), 0.0, rollout(), values)
    mask = rollout().response_mask
    advantages, returns = credit.compute_advantages(rewards, values, states, mask)
    torch.testing.assert_close(returns[:, :-1] * mask, scores[:, None] * mask)  # without a discount, the score itself
    by_hand = [[0.0] * (steps - 1) + [score] for steps, score in zip(TOKENS, scores.tolist(), strict=True)]
    torch.testing.assert_close(advantages * mask, torch.tensor(gae_by_loops(by_hand, 1.0, 0.3)))


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens_that_count() -> None:
    credit, mask = CreditAssignment(AdvantageOptions(whiten=True)), rollout().response_mask
    rewards, states = credit.token_rewards(
        torch.tensor([2.0, 3.0, -1.0]), torch.zeros(3, PADDED), 0.0, rollout(), torch.tensor(VALUES)
    )
    counted = credit.compute_advantages(rewards, torch.tensor(VALUES), states, mask).advantages[mask].double()
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(counted.var(unbiased=False)) == pytest.approx(1.0, abs=1e-5)


# The clipped objective


def experience(weights: tuple[float, ...] = (1, 1, 1), **more: Any) -> Any:
    sampled = rollout(weights=weights)
    kind = CriticExperience if more else Experience
    return kind.of(sampled, old_scores(), torch.tensor(ADVANTAGES), sampled.prompts.weights, **more)


def surrogate_by_loops(rows: list[int], normalisation: str, longest: int) -> tuple[float, float]:
    """Schulman et al. 2017, equation 7, as a loss: the sum over the rows, and what it is divided by."""
    total, divisor = 0.0, 0.0
    for b in rows:
        losses = []
        for ratio, advantage in list(zip(RATIOS[b], ADVANTAGES[b], strict=True))[: TOKENS[b]]:
            clipped = min(max(ratio, 0.8), 1.2)
            losses.append(-min(ratio * advantage, clipped * advantage))
        share = {"token": 1.0, "sequence": 1.0 / len(losses), "constant": 1.0 / longest}[normalisation]
        total += share * sum(losses)
        divisor += len(losses) if normalisation == "token" else 1.0
    return total, divisor


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0, 1)])
def test_the_surrogate_is_equation_7_over_rows_with_a_weight(normalisation: Any, weights: tuple[float, ...]) -> None:
    objective = ClippedObjective(ObjectiveOptions(normalisation=normalisation), KLOptions(), max_new_tokens=7)
    e = experience(weights)
    new = NewScores(-1.0 + torch.tensor(RATIOS).log(), torch.zeros(3, PADDED), torch.zeros(3, PADDED + 1), None)
    (loss,), metrics = objective(new, e)
    rows = [b for b, weight in enumerate(weights) if weight]
    expected, divisor = surrogate_by_loops(rows, normalisation, 7)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(objective.count(e, torch.arange(3))) == divisor
    clipped, mask = metrics["policy/clipfrac"]
    by_hand = {(0, 1): 0, (0, 2): 0, (2, 0): 1, (2, 1): 1}  # only where clipping lowers the objective
    assert all(float(clipped[place]) == flag for place, flag in by_hand.items() if mask[place])


def test_kl_and_entropy_have_their_weights_in_the_loss() -> None:
    options = ObjectiveOptions(entropy_coef=0.25)
    objective = ClippedObjective(options, KLOptions(loss_coef=0.5, loss_estimator="k2"), max_new_tokens=7)
    e = experience()
    e.reference_log_probs = torch.full((3, PADDED), -1.4)
    new = NewScores(torch.full((3, PADDED), -1.0), torch.full((3, PADDED), 2.0), torch.zeros(3, 4), None)
    tokens = sum(TOKENS)
    plain = -sum(sum(row[:steps]) for row, steps in zip(ADVANTAGES, TOKENS, strict=True))
    expected = plain + tokens * (0.5 * 0.5 * 0.4**2 - 0.25 * 2.0)
    assert float(objective(new, e).sums[0]) == pytest.approx(expected, rel=1e-5)


def test_ppos_loss_is_a_pure_function_of_new_scores_and_experience() -> None:
    """Twice the same; the value loss is half the larger of two squares (clipped at 0.2), with its coefficient."""
    values, states = torch.tensor(VALUES), torch.zeros(3, PADDED + 1, dtype=torch.bool)
    states[:, 0] = True
    e = experience(values=values, value_mask=states, returns=torch.full((3, PADDED + 1), 1.0))
    new = NewScores(torch.full((3, PADDED), -1.0), torch.zeros(3, PADDED), values + 0.5, torch.tensor(3.0))
    module = PPOModule("no folder", critic=CriticOptions(coef=0.5), ptx_coef=2.0)
    first, second = module.loss(new, e), module.loss(new, e)
    assert [float(a) for a in first.sums] == [float(b) for b in second.sums]
    squares = [max((row[0] + 0.5 - 1.0) ** 2, (row[0] + 0.2 - 1.0) ** 2) for row in VALUES]
    assert float(first.sums[1]) == pytest.approx(0.5 * 0.5 * sum(squares), rel=1e-5)
    assert float(first.sums[2]) == pytest.approx(6.0)


# Scores


class Skips(Reward):
    """A reward that may have no score."""

    may_skip = True

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.tensor([1.0, math.nan, 2.0])


def test_a_response_without_a_score_leaves_with_its_group() -> None:
    reward, totals = Skips(), Totals()
    scores = checked_scores(reward, rollout(), reward, "here")
    left, settled = settle(rollout(), scores, reward, totals)
    assert left.prompts.weights.tolist() == [1, 0, 1] and settled.tolist() == [1, 0, 2]
    assert totals.means()["reward/skipped"] == pytest.approx(1 / 3)
    left, settled = settle(rollout(), scores, reward, Totals(), group_size=3)
    assert left.prompts.weights.tolist() == [0, 0, 0] and settled.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="here"):
        checked_scores(lambda _: torch.tensor([1.0, math.inf, 2.0]), rollout(), None, "here")


# Pairs


def pairs(reference: list[float] | None) -> JudgedPairs:
    """One pair: a chosen response of three tokens that count and a rejected one of one."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rows = Rows(torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3]), torch.tensor([2, 2]), mask)
    return JudgedPairs(rows, None if reference is None else torch.tensor(reference))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpos_loss_is_a_pure_function_of_log_probs_and_reference() -> None:
    """Rafailov et al. 2023, equation 7, with log-ratios of 1.5 and -0.5."""
    loss = DPOModule("no folder", beta=0.5).loss(torch.tensor([-4.5, -3.5]), pairs([-6.0, -3.0]))
    assert float(loss.losses) == pytest.approx(-log_sigmoid(0.5 * (1.5 + 0.5)))
    assert [float(loss.metrics[f"rewards/{side}"][0]) for side in ("chosen", "rejected")] == [0.75, -0.25]
    ipo = DPOModule("no folder", beta=0.5, loss_type="ipo").loss(torch.tensor([-4.5, -3.5]), pairs([-6.0, -3.0]))
    assert float(ipo.losses) == pytest.approx((1.5 / 3 + 0.5 / 1 - 1 / (2 * 0.5)) ** 2)


def test_simpo_reads_the_mean_over_the_tokens_that_count() -> None:
    loss = SimPOModule("no folder", beta=2.0, gamma=0.4).loss(torch.tensor([-4.5, -3.5]), pairs(None))
    assert float(loss.losses) == pytest.approx(-log_sigmoid(2.0 * (-1.5 + 3.5) - 0.4))
    with pytest.raises(AssertionError):
        pairs(None).log_ratios(torch.zeros(2))


@pytest.mark.parametrize("paired", [True, False])
def test_ktos_loss_is_that_of_each_response_and_a_pairs_the_mean_of_two(paired: bool) -> None:
    """Ethayarajh et al. 2024, equations 7 and 8, with log-ratios of 1.5 and -0.5 and z0 of 0.25."""
    module = KTOModule("no folder", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    rows, z0 = pairs(None).rows, torch.tensor(0.25)
    fixed = JudgedResponses(rows, torch.tensor([-6.0, -3.0]), z0, torch.tensor([True, False]), paired)
    loss = module.loss(torch.tensor([-4.5, -3.5]), fixed)
    each = [
        2.0 * (1 - 1 / (1 + math.exp(-0.5 * (1.5 - 0.25)))),
        3.0 * (1 - 1 / (1 + math.exp(-0.5 * (0.25 + 0.5)))),
    ]
    expected = [sum(each) / 2] if paired else each
    torch.testing.assert_close(loss.losses, torch.tensor(expected))
    totals = Totals()
    loss.add_to(totals, torch.ones(len(expected)), str)
    means = totals.means()
    assert (means["accuracy"], means["rewards/chosen"], means["logps/rejected"]) == (1.0, 0.75, -3.5)
    assert means["loss"] == pytest.approx(sum(expected) / len(expected)) and ("margin" in means) == paired


def test_a_frozen_reference_is_no_part_of_the_module() -> None:
    module = DPOModule("no folder")
    assert isinstance(module.frozen, FrozenReference) and module.reference is None
    module.frozen.model = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    assert module.reference is module.frozen.model and not list(module.parameters())
