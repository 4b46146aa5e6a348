"""PPO's options from later papers, each against its formula: critic warm-up, decoupled and length-adaptive lambdas,
importance weights for a foreign engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from making import merged
from ppo_cases import run, write_prompts
from ppo_harness import Recorder, TokenReward, fit, make_module

from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules import GRPOModule, PPOModule, ReinforcePlusPlusModule, RLOOModule

CRITICS = ["model", "head"]


# ---------------------------------------------------------------- critic warm-up


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_learns_alone_while_it_warms_up(tiny_policy_dir, critic):
    options = {
        "iterations": 3,
        "critic": {"warmup": 2},
        "update": {"epochs": 2, "minibatches": 2},
        "optimizer": {"weight_decay": 0.1},
    }
    module = make_module(tiny_policy_dir, **merged(options, {"critic": {"kind": critic}}))
    seen = []

    def keep(*_):
        seen.append([[p.detach().clone() for p in part] for part in module.actors.own_parameters()])

    module.on_train_batch_start = lambda *_: seen or keep()
    module.on_train_batch_end = keep
    fit(module)
    for iteration in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[iteration][0], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(seen[iteration - 1][1], seen[iteration][1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[2][0], seen[3][0], strict=True))
    # The policy's optimizer starts after the warm-up: it has not counted the critic's steps.
    optimizer = module.trainer.optimizers[0]
    policy, own = module.actors.own_parameters()
    assert {int(optimizer.state[p]["step"]) for p in policy} == {4}
    assert {int(optimizer.state[p]["step"]) for p in own} == {12}


@pytest.mark.parametrize("critic", CRITICS)
def test_the_warm_up_runs_no_backward_pass_of_the_policy_and_learns_the_same(tiny_policy_dir, critic, monkeypatch):
    options = {"iterations": 3, "critic": {"warmup": 2}, "update": {"minibatches": 2, "micro_batch_tokens": 40}}
    module = make_module(tiny_policy_dir, **merged(options, {"critic": {"kind": critic}}))
    made = []  # (iteration, network) of every gradient that is computed

    def watch():
        for name, part in zip(("policy", "critic"), module.actors.own_parameters(), strict=True):
            for parameter in part:
                parameter.register_hook(lambda _, name=name: made.append((module.iteration, name)))

    module.on_train_start = watch
    fit(module)
    assert {(iteration, name) for iteration, name in made} == {
        (0, "critic"),
        (1, "critic"),
        (2, "policy"),
        (2, "critic"),
    }
    # With the gradient computed, and then thrown away:
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda *a, trained=True, **k: forward(*a, **k))
    whole = make_module(tiny_policy_dir, **merged(options, {"critic": {"kind": critic}}))
    fit(whole)
    for name, weight in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight), name
    names = [name for name in whole.logged[0] if not name.startswith(("time/", "rollout/tokens_per_second"))]
    for mine, theirs in zip(module.logged, whole.logged, strict=True):
        assert {n: mine[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_run_resumed_in_the_warm_up_goes_on_exactly(tiny_policy_dir, tmp_path, strategy):
    write_prompts(tmp_path / "prompts.jsonl")
    options = {"iterations": 3, "critic": {"warmup": 2}, "update": {"minibatches": 2}}
    case = {"policy": str(tiny_policy_dir), "data": str(tmp_path / "prompts.jsonl"), "batch_size": 5}
    case |= {"options": options, "trainer": {"strategy": strategy}, "folder": str(tmp_path / "whole")}
    try:
        whole = run({**case, "checkpoints": True})
        first = min((tmp_path / "whole").rglob("batch-*.ckpt"))
        resumed = run({**case, "resume": str(first)})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in whole["weights"].items())


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critics_own_parameters_have_its_learning_rate_and_no_others(tiny_policy_dir, critic):
    module = make_module(
        tiny_policy_dir, critic={"kind": critic, "learning_rate": 5e-3}, optimizer={"learning_rate": 1e-3}
    )
    fit(module)
    own = [part for part in (module.critic, module.policy.critic_head) if part is not None]
    expected = {id(parameter): 1e-3 for parameter in module.parameters()}
    expected |= {id(parameter): 5e-3 for part in own for parameter in part.parameters()}
    groups = module.trainer.optimizers[0].param_groups
    assert {id(parameter): group["lr"] for group in groups for parameter in group["params"]} == expected
    assert set(expected.values()) == {1e-3, 5e-3}


# ---------------------------------------------------------------- lambdas


def advantages_by_definition(module: Recorder, lam_of_length) -> list[torch.Tensor]:
    """``sum_k lam^k delta[t + k]`` in float64, a row at a time; gamma 1, no KL."""
    e, rollout, rows = module.experiences[0], module.rollouts[0], []
    for row, steps in enumerate(rollout.response_lengths.tolist()):
        rewards = torch.zeros(steps, dtype=torch.float64)
        rewards[-1] = TokenReward()(rollout)[row]
        values = torch.cat([e.values[row, :steps].double(), torch.zeros(1, dtype=torch.float64)])
        deltas = rewards + values[1:] - values[:-1]
        powers = lam_of_length(steps) ** torch.arange(steps, dtype=torch.float64)
        rows.append(torch.stack([(powers[: steps - t] * deltas[t:]).sum() for t in range(steps)]))
    return rows


@pytest.mark.parametrize("alpha", [None, 0.4])
def test_critic_and_policy_have_a_lambda_each(tiny_policy_dir, alpha):
    own = {"lam": 0.9} if alpha is None else {"lam_alpha": alpha}
    options = {"kl": {"coef": 0.0}, "advantages": {"whiten": False, "critic_lam": 1.0, **own}}
    module = make_module(tiny_policy_dir, sampling={"max_new_tokens": 12}, **options)
    fit(module)
    e = module.experiences[0]
    # VAPO: lambda = 1 - 1 / (alpha l); responses of two tokens or fewer would get one below 0 here.
    policy_lam = (lambda steps: 0.9) if alpha is None else (lambda steps: max(0.0, 1 - 1 / (alpha * steps)))
    assert len(set(module.rollouts[0].response_lengths.tolist())) > 2
    for row, expected in enumerate(advantages_by_definition(module, policy_lam)):
        got = e.advantages[row, : len(expected)].double()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for row, expected in enumerate(advantages_by_definition(module, lambda steps: 1.0)):
        steps = len(expected)
        returns = expected + e.values[row, :steps].double()
        torch.testing.assert_close(e.returns[row, :steps].double(), returns, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- importance weights


def foreign(policy, method, **options):
    """A module whose engine finds other probabilities than the policy's, after its only iteration."""
    module = make_module(policy, TokenReward(), method, **merged({"optimizer": {"learning_rate": 1e-12}}, options))
    generate = module.generate

    def generated(*arguments, **keywords):
        rollout = generate(*arguments, **keywords)
        places = torch.arange(rollout.log_probs.numel(), dtype=torch.float64).reshape(rollout.log_probs.shape)
        return replace(rollout, log_probs=(rollout.log_probs + 0.6 * torch.sin(places)).float())

    module.generate = generated
    fit(module)
    return module


@pytest.mark.parametrize("method", [PPOModule, GRPOModule, RLOOModule, ReinforcePlusPlusModule])
def test_advantages_are_weighted_by_the_truncated_ratio_to_the_engine(tiny_policy_dir, method):
    options = {"group_size": 2} if method in (GRPOModule, RLOOModule) else {}
    plain = foreign(tiny_policy_dir, method, **options)
    weighted = foreign(tiny_policy_dir, method, objective={"importance_cap": 1.3}, **options)
    a, b, rollout = plain.experiences[0], weighted.experiences[0], weighted.rollouts[0]
    ratio = (b.log_probs.double() - rollout.log_probs.double()).exp()
    expected = a.advantages.double() * ratio.clamp(max=1.3)
    got = b.advantages.double()
    torch.testing.assert_close(got[b.mask], expected[b.mask], atol=1e-5, rtol=1e-5)
    logged = weighted.logged[0]
    assert logged["importance/weight"] == pytest.approx(ratio.clamp(max=1.3)[b.mask].mean().item(), rel=1e-5)
    assert logged["importance/capped"] == pytest.approx((ratio >= 1.3)[b.mask].double().mean().item())
    assert 0 < logged["importance/capped"] < 1
    if method is PPOModule:
        assert torch.equal(a.returns, b.returns)  # the critic learns what came, unweighted
