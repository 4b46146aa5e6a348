"""PPO against an optimum that is known exactly, and against itself under every split of the same work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bandit import BETA, EOS, PROMPT, Bandit, BanditReward, repeated_prompt, save_small_policy
from making import merged
from ppo_harness import fit, make_module, prompts
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.models.positions import response_states
from rlhf_lightning.rewards import Reward


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_finds_the_optimum_and_its_value_of_a_small_known_problem(tmp_path, seed):
    """With the KL in the reward the optimal policy is reference * exp(reward / beta) / Z, and the value of the prompt
    under it is beta log Z (Ziegler et al. 2019, section 2; the soft value of the exactly enumerated problem)."""
    save_small_policy(tmp_path, seed)
    bandit = Bandit.make()
    reference = bandit.log_probs(LlamaForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(reference.exp().sum().item(), 1.0)
    optimum = BETA * torch.logsumexp(reference + bandit.rewards / BETA, 0).item()
    iterations = 70
    module = make_module(
        tmp_path,
        BanditReward(bandit),
        iterations=iterations,
        seed=seed,
        sampling={"max_new_tokens": 2},
        kl={"coef": BETA},
        critic={"learning_rate": 3e-3, "coef": 1.0},
        advantages={"lam": 1.0},
        update={"epochs": 2, "minibatches": 2, "micro_batch_tokens": 10_000},
        optimizer={"learning_rate": 3e-3, "schedule": "linear"},
    )
    start = bandit.objective(LlamaForCausalLM.from_pretrained(tmp_path), reference)
    fit(module, [repeated_prompt(64, i) for i in range(iterations)])
    reached = bandit.objective(module.policy.model, reference)
    assert optimum - start > 0.4  # there is something to learn
    assert optimum - reached < 0.03 * (optimum - start)
    # The policy itself, not only its worth: total variation from the optimal one.
    best = (reference + bandit.rewards / BETA).log_softmax(0).exp()
    assert 0.5 * (bandit.log_probs(module.policy.model).exp() - best).abs().sum().item() < 0.1
    with torch.no_grad():
        tokens, lengths = torch.tensor([[*PROMPT, 6]]), torch.tensor([3])
        values = response_states(module.critic(tokens, lengths), torch.tensor([2]), lengths)
    assert values[0, 0].item() == pytest.approx(optimum, abs=0.15)
    # And of the state after a 6 first: the score comes at the end, so both its parts are still to be paid there.
    second = [i for i, response in enumerate(bandit.responses) if response[0] == 6]
    conditional = (reference[second]).log_softmax(0)
    after_six = BETA * torch.logsumexp(conditional + bandit.rewards[second] / BETA, 0).item()
    with torch.no_grad():
        values = response_states(
            module.critic(torch.tensor([[*PROMPT, 6, EOS]]), torch.tensor([4])), torch.tensor([2]), torch.tensor([4])
        )
    assert values[0, 1].item() == pytest.approx(after_six, abs=0.2)


class One(Reward):
    """Every response is worth 1."""

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.ones(len(rollout))


def test_values_that_bootstrap_cut_responses_settle_at_what_is_earned(tmp_path):
    """However long it takes, the response that goes on from here will earn 1, once."""
    save_small_policy(tmp_path, seed=0)
    module = make_module(
        tmp_path,
        One(),
        iterations=60,
        sampling={"max_new_tokens": 4},
        kl={"coef": 0.0},
        critic={"learning_rate": 3e-3, "coef": 1.0},
        advantages={"bootstrap_truncated": True},
        update={"epochs": 2, "minibatches": 2, "micro_batch_tokens": 10_000},
        optimizer={"learning_rate": 1e-12},
    )
    fit(module, [repeated_prompt(32, i) for i in range(60)])
    cut = torch.stack([rollout.truncated.float().mean() for rollout in module.rollouts])
    assert cut.min() > 0.2 and cut.max() < 0.95
    returns = torch.stack([e.returns[:, 0].mean() for e in module.experiences])
    torch.testing.assert_close(returns[-20:], torch.ones(20), atol=0.15, rtol=0)


# ---------------------------------------------------------------- the same work, split otherwise


def weights(module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_training(one, other) -> None:
    """Weights after training agree to what fp32 rounding leaves of one Adam step; a real difference is a whole one."""
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, atol=2e-5, rtol=1e-4, msg=name)


OPTIONS = {
    "iterations": 2,
    "kl": {"coef": 0.1},
    "update": {"epochs": 2, "minibatches": 2},
    "optimizer": {"learning_rate": 1e-4, "eps": 1e-3},
}


@pytest.fixture
def plain(tiny_policy_dir):
    module = make_module(tiny_policy_dir, **OPTIONS)
    fit(module)
    return module


def test_training_moves_the_weights_far_more_than_the_tolerance(tiny_policy_dir, plain):
    start = LlamaForCausalLM.from_pretrained(tiny_policy_dir).state_dict()
    moved = max((plain.policy.model.state_dict()[name] - value).abs().max().item() for name, value in start.items())
    assert moved > 2e-4


@pytest.mark.parametrize("critic", ["model", "head"])
def test_micro_batches_do_not_change_the_result(tiny_policy_dir, critic):
    modules = [
        make_module(
            tiny_policy_dir, **merged(OPTIONS, {"critic": {"kind": critic}, "update": {"micro_batch_tokens": n}})
        )
        for n in (1, 30, 10_000)
    ]
    for module in modules:
        fit(module)
    assert_same_training(modules[0], modules[2])
    assert_same_training(modules[1], modules[2])


def test_extra_padding_does_not_change_the_result(tiny_policy_dir, plain):
    padded = make_module(tiny_policy_dir, **OPTIONS)
    fit(padded, [prompts(start=8 * i, padding=11) for i in range(2)])
    assert_same_training(padded, plain)


def test_row_order_does_not_change_the_result(tiny_policy_dir):
    options = merged(OPTIONS, {"update": {"minibatches": 1}})
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    plain, shuffled = make_module(tiny_policy_dir, **options), make_module(tiny_policy_dir, **options)
    fit(plain)
    fit(shuffled, [reordered(prompts(start=8 * i), order) for i in range(2)])
    assert_same_training(shuffled, plain)


def test_filler_rows_do_not_change_the_result(tiny_policy_dir):
    options = merged(OPTIONS, {"iterations": 1, "update": {"minibatches": 1}})
    plain, filled = make_module(tiny_policy_dir, **options), make_module(tiny_policy_dir, **options)
    fit(plain, [prompts(6)])
    batch = prompts(8)
    fit(filled, [replace(batch, weights=torch.tensor([1.0] * 6 + [0.0] * 2))])
    assert_same_training(filled, plain)
    timed = ("time/", "rollout/tokens_per_second", "rollout/max_length")
    for name, value in plain.logged[0].items():
        if not name.startswith(timed):
            assert filled.logged[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def reordered(batch: PromptBatch, order: Tensor) -> PromptBatch:
    return replace(
        batch,
        tokens=batch.tokens[order],
        lengths=batch.lengths[order],
        rows=batch.rows[order],
        prompts=[batch.prompts[i] for i in order.tolist()],
    )
