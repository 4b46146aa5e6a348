"""What keeps the policy near, over a run: the adaptive KL coefficient and the early stop, against their formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from making import merged
from ppo_harness import fit, make_module
from torch import Tensor

START, HORIZON = 0.1, 40.0


def coefficients(policy, reference, **options) -> list[dict[str, float]]:
    """What each of four iterations of 8 responses logged."""
    options = merged({"iterations": 4, "kl": {"coef": START}}, options)
    module = make_module(policy, reference=str(reference), **options)
    fit(module)
    return module.logged


@pytest.mark.parametrize("share", [0.3, 0.93, 1.07, 5.0])
def test_the_next_coefficient_is_that_of_ziegler(tiny_policy_dir, other_policy_dir, share):
    """``beta (1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon)``: Ziegler et al. 2019, section 2.2."""
    kl = coefficients(tiny_policy_dir, other_policy_dir)[0]["objective/kl"]
    assert kl > 0
    logged = coefficients(tiny_policy_dir, other_policy_dir, kl={"target": kl * share, "horizon": HORIZON})
    assert logged[0]["objective/kl_coef"] == START
    assert (logged[1]["objective/kl_coef"] > START) == (share < 1)
    for now, then in itertools.pairwise(logged):
        error = min(max(now["objective/kl"] / (kl * share) - 1, -0.2), 0.2)
        expected = now["objective/kl_coef"] * (1 + error * 8 / HORIZON)
        assert then["objective/kl_coef"] == pytest.approx(expected, rel=1e-9)


def test_the_coefficient_waits_until_the_critic_is_warm(tiny_policy_dir):
    """The policy is still its reference: a KL of 0 says nothing of the coefficient."""
    options = {"kl": {"target": 1.0, "horizon": HORIZON}, "critic": {"warmup": 2}}
    logged = coefficients(tiny_policy_dir, tiny_policy_dir, **options)
    assert [metrics["objective/kl"] for metrics in logged[:3]] == [0.0] * 3
    then = [metrics["objective/kl_coef"] for metrics in logged]
    assert then == pytest.approx([START, START, START, START * (1 - 0.2 * 8 / HORIZON)])


def test_the_update_ends_at_the_first_minibatch_past_kl_stop(tiny_policy_dir):
    def weights(module) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    options = {"update": {"epochs": 2, "minibatches": 3}}
    plain = make_module(tiny_policy_dir, kl={"stop": 1e9}, **options)
    moved, before = [], []  # of each minibatch: its approximate KL, and the weights before its step

    def watch(approx_kl) -> bool:
        moved.append(approx_kl)
        before.append(weights(plain))
        return False

    plain.kl.exceeds_stop = watch
    fit(plain)
    before.append(weights(plain))
    assert moved[0] < 1e-10 < moved[1] < max(moved[2:])  # the first is of the policy that sampled
    for bound in (moved[1] / 2, moved[1] * 1.001, max(moved) * 1.001):
        module = make_module(tiny_policy_dir, kl={"stop": bound}, **options)
        fit(module)
        steps = next((number for number, kl in enumerate(moved) if kl > bound), len(moved))
        assert module.logged[0]["policy/steps"] == steps > 0
        assert torch.equal(weights(module), before[steps])


def test_an_engine_too_far_from_the_policy_for_any_step_is_warned_about(tiny_policy_dir):
    options = {
        "iterations": 1,
        "sampling": {"top_k": 2},
        "kl": {"stop": 1e-3},
        "objective": {"old_log_probs": "rollout"},
    }
    module = make_module(tiny_policy_dir, **options)
    with pytest.warns(UserWarning, match="iteration 0: before its first step .* let a pass recompute them"):
        fit(module)
    assert module.logged[0]["policy/steps"] == 0
