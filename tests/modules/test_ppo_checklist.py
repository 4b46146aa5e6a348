"""docs/ppo.md, item by item: a test of the same number for each detail."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making import merged
from ppo_harness import Recorder, TokenReward, fit, make_module, prompts
from tiny_models import make_config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.algorithms.losses import bradley_terry_loss
from rlhf_lightning.batches import Rollout, View, length_mask
from rlhf_lightning.cli.training import _TRAINER_DEFAULTS
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.positions import at_last_token, response_states
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.ppo import NewScores
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.ops.sample_tokens import sample_tokens
from rlhf_lightning.rewards import ModelReward, Reward
from rlhf_lightning.training.totals import Totals

EOS = 1


def one_iteration(policy: Path, reward: Reward | None = None, **options) -> Recorder:
    module = make_module(policy, reward, **options)
    fit(module)
    return module


@torch.no_grad()
def softmax_log_probs(folder: Path, rollout: Rollout, temperature: float = 1.0) -> list[Tensor]:
    """Log-probs of each response, one unpadded row at a time, by the stock model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = []
    for row in range(len(rollout)):
        tokens = rollout.tokens[row, : rollout.lengths[row]]
        start = int(rollout.prompt_lengths[row])
        table = (model(tokens[None]).logits[0] / temperature).log_softmax(-1)
        rows.append(table[start - 1 : -1].gather(1, tokens[start:, None])[:, 0])
    return rows


# ---------------------------------------------------------------- data and tokens


def test_01_a_pad_that_is_eos_changes_nothing(tiny_policy_dir, pad_is_eos_tokenizer, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(tiny_policy_dir, twin)
    pad_is_eos_tokenizer.save_pretrained(twin)
    plain, same = one_iteration(tiny_policy_dir), one_iteration(twin)
    assert torch.equal(plain.rollouts[0].tokens, same.rollouts[0].tokens)
    assert torch.equal(plain.experiences[0].advantages, same.experiences[0].advantages)
    timed = ("time/", "rollout/tokens_per_second")
    numbers = [{k: v for k, v in m.logged[0].items() if not k.startswith(timed)} for m in (plain, same)]
    assert numbers[0] == numbers[1]


def test_02_padding_of_prompts_does_not_change_the_responses(tiny_policy_dir):
    module, padded = make_module(tiny_policy_dir), make_module(tiny_policy_dir)
    fit(module, [prompts()])
    fit(padded, [prompts(padding=9)])
    assert torch.equal(module.rollouts[0].tokens, padded.rollouts[0].tokens)
    torch.testing.assert_close(module.experiences[0].advantages, padded.experiences[0].advantages)


@pytest.fixture
def demonstration(tiny_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the cat", "chosen": " sees a bird", "rejected": " is"}\n')
    data = PreferenceDataModule(str(path), validation_fraction=0.0)
    (batch,) = data.prepare(View("demonstrations"), tiny_tokenizer).train_dataloader()
    return batch


def test_03_a_response_ends_with_its_eos_once(demonstration, tiny_tokenizer):
    words = tiny_tokenizer.convert_ids_to_tokens(demonstration.tokens[0, : demonstration.lengths[0]].tolist())
    assert words == ["the", "cat", "sees", "a", "bird", "<eos>"]
    assert demonstration.prompt_lengths.tolist() == [2]


def test_05_sft_learns_the_response_and_not_the_prompt(demonstration, tiny_policy_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    table = model(demonstration.tokens).logits[0].log_softmax(-1)
    expected = -sum(table[place, demonstration.tokens[0, place + 1]] for place in range(1, 5))
    module = SFTModule(str(tiny_policy_dir))
    module.policy = Policy(model)
    torch.testing.assert_close(module.training_step(demonstration, 0), expected, atol=1e-5, rtol=1e-5)


def test_04_positions_start_at_the_first_real_token(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir)
    experience = module.experiences[0]
    for row, expected in enumerate(softmax_log_probs(tiny_policy_dir, module.rollouts[0])):
        torch.testing.assert_close(experience.log_probs[row, : len(expected)].double(), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- models


def test_06_dropout_is_off(tiny_tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_dropout=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path).train()
    tokens = torch.arange(4, 10)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_07_policy_reference_and_critic_start_where_they_should(tiny_policy_dir, tiny_reward_dir):
    module = make_module(
        tiny_policy_dir,
        ModelReward(str(tiny_reward_dir)),
        critic={"learning_rate": 1e-12},
        optimizer={"learning_rate": 1e-12},
    )
    fit(module)
    policy, reference = module.policy.state_dict(), module.reference.state_dict()
    assert all(torch.allclose(policy[name], reference[name], atol=1e-9) for name in policy)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(policy.values(), reference.values(), strict=True))
    trained = load_scalar_model(tiny_reward_dir, fresh_head=False).state_dict()
    assert all(
        torch.allclose(value, trained[name], atol=1e-9) for name, value in module.critic.model.state_dict().items()
    )


def test_08_a_fresh_head_has_deviation_one_over_root_width_plus_one(tiny_policy_dir):
    heads = [load_scalar_model(tiny_policy_dir, fresh_head=True, seed=seed).score for seed in range(40)]
    drawn = torch.cat([head.weight.flatten() for head in heads])
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.05)
    assert all(head.bias is None or not head.bias.any() for head in heads)


def test_09_the_reward_is_normalised_by_what_its_config_holds(tiny_policy_dir, tiny_reward_dir, tmp_path):
    shutil.copytree(tiny_reward_dir, tmp_path / "normalised")
    model = load_scalar_model(tiny_reward_dir, fresh_head=False)
    model.config.reward_mean, model.config.reward_std = 2.0, 4.0
    model.config.save_pretrained(tmp_path / "normalised")
    raw = one_iteration(tiny_policy_dir, ModelReward(str(tiny_reward_dir)))
    normalised = one_iteration(tiny_policy_dir, ModelReward(str(tmp_path / "normalised")))
    expected = (raw.logged[0]["objective/scores"] - 2.0) / 4.0
    assert normalised.logged[0]["objective/scores"] == pytest.approx(expected, abs=1e-6)


def test_10_and_11_the_score_is_at_the_last_real_token_whatever_the_padding(tiny_reward_dir):
    scalar = ScalarModel(load_scalar_model(tiny_reward_dir, fresh_head=False, dtype=torch.float64))
    batch = prompts(6)
    alone = [scalar(t[None, :n], n[None])[0, -1] for t, n in zip(batch.tokens, batch.lengths, strict=True)]
    for padding in (0, 7):
        tokens = torch.nn.functional.pad(batch.tokens, (0, padding), value=EOS)
        scores = at_last_token(scalar(tokens, batch.lengths), batch.lengths)
        torch.testing.assert_close(scores, torch.stack(alone))


def test_12_the_reward_loss_is_bradley_terry_with_a_margin_and_one_epoch_the_default():
    loss = bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.5]))
    expected = torch.tensor([math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.5))])
    torch.testing.assert_close(loss.float(), expected)
    assert _TRAINER_DEFAULTS["max_epochs"] == 1


# ---------------------------------------------------------------- rollout


def test_13_sampling_is_from_the_full_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    probabilities = logits[0].double().softmax(0)
    rows = 20_000
    draws = (torch.arange(rows, dtype=torch.float64) * 0.6180339887498949) % 1.0  # evenly spread
    tokens, log_probs, _ = sample_tokens(logits.expand(rows, -1), draws)
    shares = torch.bincount(tokens, minlength=4).double() / rows
    torch.testing.assert_close(shares, probabilities, atol=2e-3, rtol=0)
    torch.testing.assert_close(log_probs, probabilities.log()[tokens].float())


def test_14_the_temperature_is_in_every_log_prob(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir, sampling={"temperature": 0.5})
    experience = module.experiences[0]
    for row, expected in enumerate(softmax_log_probs(tiny_policy_dir, module.rollouts[0], temperature=0.5)):
        for ours in (experience.log_probs, experience.reference_log_probs, module.rollouts[0].log_probs):
            torch.testing.assert_close(ours[row, : len(expected)].double(), expected, atol=1e-5, rtol=0)


def test_15_the_first_ratio_is_one_and_the_gap_to_the_rollout_is_logged(tiny_policy_dir):
    logged = one_iteration(tiny_policy_dir).logged[0]
    assert logged["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert logged["policy/approx_kl"] == pytest.approx(0.0, abs=1e-10)
    assert logged["policy/clipfrac"] == 0.0
    assert logged["objective/kl"] == logged["objective/kl_k3"] == 0.0  # the reference is the policy
    assert 0 <= logged["rollout/logprob_gap"] < 1e-5
    narrow = one_iteration(tiny_policy_dir, sampling={"top_k": 2}).logged[0]
    assert narrow["rollout/logprob_gap"] > 0.1  # the truncated distribution's log-probs are not the model's


@pytest.mark.parametrize("critic", ["model", "head"])
def test_15_the_rollouts_own_log_probs_spare_a_pass_of_the_policy(tiny_policy_dir, critic, monkeypatch):
    """Its critic's values are the same; a critic on the policy's trunk needs the trunk."""
    options = {"critic": {"kind": critic}, "update": {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 10**6}}
    plain = one_iteration(tiny_policy_dir, **options)
    calls, forward = [], Policy.forward
    monkeypatch.setattr(
        Policy,
        "forward",
        lambda self, *args, **options: calls.append((self, len(args[0]))) or forward(self, *args, **options),
    )
    module = one_iteration(tiny_policy_dir, objective={"old_log_probs": "rollout"}, **options)
    # One in the update; the decode loop tries itself on a single row.
    assert sum(policy is module.policy and rows > 1 for policy, rows in calls) == (1 if critic == "model" else 2)
    old, recomputed = module.experiences[0], plain.experiences[0]
    assert old.log_probs is module.rollouts[0].log_probs and "rollout/logprob_gap" not in module.logged[0]
    torch.testing.assert_close(old.log_probs, recomputed.log_probs, atol=1e-5, rtol=0)
    assert torch.equal(old.values, recomputed.values)
    assert torch.equal(old.reference_log_probs, recomputed.reference_log_probs)


def test_16_a_row_ends_with_its_eos(tiny_policy_dir):
    rollout = one_iteration(tiny_policy_dir, sampling={"max_new_tokens": 40}).rollouts[0]
    ended = ~rollout.truncated
    assert ended.any()
    in_response = length_mask(rollout.lengths, rollout.tokens.shape[1]) & ~length_mask(
        rollout.prompt_lengths, rollout.tokens.shape[1]
    )
    eos = ((rollout.tokens == EOS) & in_response).sum(dim=1)
    assert torch.equal(eos, ended.long())
    assert (at_last_token(rollout.tokens, rollout.lengths)[ended] == EOS).all()
    assert not rollout.tokens[~length_mask(rollout.lengths, rollout.tokens.shape[1])].any()


def test_17_a_value_is_of_the_state_before_its_token(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir)
    experience = module.experiences[0]
    changed = experience.tokens.clone()
    last = experience.lengths - 1
    changed[torch.arange(len(last)), last] = 4 + (changed[torch.arange(len(last)), last] - 3) % 60
    with torch.no_grad():
        before, after = (
            response_states(
                module.critic(tokens, experience.lengths), experience.prompt_lengths, experience.lengths + 1
            )
            for tokens in (experience.tokens, changed)
        )
    steps = experience.lengths - experience.prompt_lengths
    different = (before - after).abs() > 1e-6
    assert not different[length_mask(steps, different.shape[1])].any()  # up to and with the state before the last token
    assert different.gather(1, steps[:, None]).all()  # the state after it


def test_18_a_response_without_eos_is_marked_and_penalised_or_credited_with_the_value_of_its_cut(tiny_policy_dir):
    plain, penalised = (
        one_iteration(tiny_policy_dir),
        one_iteration(tiny_policy_dir, scores={"missing_eos_penalty": 3.0}),
    )
    truncated = plain.rollouts[0].truncated
    assert truncated.any()
    assert not truncated.all()
    rollout, scores = plain.rollouts[0], torch.arange(8.0)
    torch.testing.assert_close(penalised.shaping(scores, rollout), scores - 3.0 * truncated)
    assert torch.equal(plain.shaping(scores, rollout), scores)
    boot = one_iteration(
        tiny_policy_dir, kl={"coef": 0.0}, advantages={"bootstrap_truncated": True, "lam": 1.0, "gamma": 0.9}
    )
    e, score = boot.experiences[0], TokenReward()(rollout)
    steps = e.lengths - e.prompt_lengths
    after = e.values.gather(1, steps[:, None])[:, 0]
    # The score is paid where the response ends. A cut is no end: the value there stands for all that is still to come.
    expected = 0.9 ** (steps - 1) * torch.where(truncated, 0.9 * after, score)
    torch.testing.assert_close(e.returns[:, 0], expected, atol=1e-5, rtol=0)


def test_19_an_eos_or_pad_id_inside_the_prompt_does_not_end_it(tiny_policy_dir):
    batch = prompts()
    batch = replace(batch, tokens=batch.tokens.clone())
    batch.tokens[:, 0] = EOS
    batch.tokens[:, 1] = 0
    module = make_module(tiny_policy_dir)
    fit(module, [batch])
    assert torch.equal(module.rollouts[0].prompt_lengths, batch.lengths)
    assert (module.rollouts[0].response_lengths > 0).all()


def test_20_the_critic_has_one_more_state_after_eos(tiny_policy_dir):
    last, after = (
        one_iteration(tiny_policy_dir, advantages={"score_position": where}) for where in ("last_token", "after_eos")
    )
    ended = (~last.rollouts[0].truncated).long()
    assert torch.equal(last.experiences[0].value_mask.sum(1), last.rollouts[0].response_lengths)
    assert torch.equal(after.experiences[0].value_mask.sum(1), last.rollouts[0].response_lengths + ended)
    assert torch.equal(after.experiences[0].mask, last.experiences[0].mask)


# ---------------------------------------------------------------- reward and advantage


def raw_advantages(module: Recorder, kl_coef: float, lam: float, gamma: float = 1.0) -> list[Tensor]:
    """GAE by its definition as a sum, float64, a row at a time: sum_l (gamma lam)^l delta_{t+l}."""
    e, rollout = module.experiences[0], module.rollouts[0]
    scores, rows = TokenReward()(rollout).double(), []
    for row in range(len(rollout)):
        steps = int(rollout.response_lengths[row])
        rewards = -kl_coef * (e.log_probs[row, :steps] - e.reference_log_probs[row, :steps]).double()
        rewards[-1] += scores[row]
        values = torch.cat([e.values[row, :steps].double(), torch.zeros(1, dtype=torch.float64)])
        deltas = rewards + gamma * values[1:] - values[:-1]
        powers = (gamma * lam) ** torch.arange(steps, dtype=torch.float64)
        rows.append(torch.stack([(powers[: steps - t] * deltas[t:]).sum() for t in range(steps)]))
    return rows


@pytest.fixture(scope="module")
def other_reference(tmp_path_factory, kept_tokenizer):
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config()).save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder


def test_21_to_25_rewards_advantages_and_returns(tiny_policy_dir, other_reference):
    module = one_iteration(
        tiny_policy_dir,
        reference=str(other_reference),
        kl={"coef": 0.3},
        advantages={"lam": 0.9, "gamma": 0.97, "whiten": False},
    )
    e = module.experiences[0]
    assert module.logged[0]["objective/kl"] > 0.1  # there is a KL to charge
    for row, expected in enumerate(raw_advantages(module, kl_coef=0.3, lam=0.9, gamma=0.97)):
        steps = len(expected)
        torch.testing.assert_close(e.advantages[row, :steps].double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            e.returns[row, :steps].double(), expected + e.values[row, :steps], atol=1e-4, rtol=1e-4
        )
    assert not e.advantages[~e.mask].any()


def test_22_after_eos_discounts_the_score_once_more(tiny_policy_dir):
    options = {"sampling": {"max_new_tokens": 30}, "kl": {"coef": 0.0}, "advantages": {"whiten": False, "lam": 0.5}}
    module = one_iteration(tiny_policy_dir, **merged(options, {"advantages": {"score_position": "after_eos"}}))
    e, rollout = module.experiences[0], module.rollouts[0]
    row = int((~rollout.truncated).nonzero()[0])
    steps = int(rollout.response_lengths[row])
    score = TokenReward()(rollout)[row]
    v = e.values[row]
    expected = (v[steps] - v[steps - 1]) + 0.5 * (score - v[steps])  # delta of EOS, then half the delta after it
    torch.testing.assert_close(e.advantages[row, steps - 1], expected, atol=1e-5, rtol=1e-5)


def test_23_reward_whitening_keeps_the_mean(tiny_policy_dir):
    options = {"kl": {"coef": 0.0}, "advantages": {"whiten": False, "lam": 1.0}}
    plain, white = (
        one_iteration(tiny_policy_dir, **merged(options, {"advantages": {"whiten_rewards": w}})) for w in (False, True)
    )
    rollout = plain.rollouts[0]
    scores, steps = TokenReward()(rollout).double(), rollout.response_lengths
    rewards = torch.cat(
        [torch.cat([torch.zeros(n - 1).double(), s[None]]) for s, n in zip(scores, steps.tolist(), strict=True)]
    )
    scale = 1 / torch.sqrt(rewards.var(correction=0) + 1e-8)
    whitened = (rewards - rewards.mean()) * scale + rewards.mean()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), steps.cumsum(0)[:-1]])
    expected = torch.stack([whitened[a : a + n].sum() for a, n in zip(starts, steps.tolist(), strict=True)])
    torch.testing.assert_close(white.experiences[0].returns[:, 0].double(), expected, atol=1e-4, rtol=1e-4)


def test_26_advantages_are_whitened_over_the_iteration(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir)
    counted = module.experiences[0].advantages[module.experiences[0].mask].double()
    assert abs(counted.mean().item()) < 1e-6
    assert counted.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    raw = torch.cat(raw_advantages(module, kl_coef=0.05, lam=0.95))
    expected = (raw - raw.mean()) / torch.sqrt(raw.var(correction=0) + 1e-8)
    torch.testing.assert_close(counted, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- update


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_27_optimizer_steps_are_epochs_times_minibatches(tiny_policy_dir, micro_batch_tokens):
    module = make_module(
        tiny_policy_dir, iterations=2, update={"epochs": 3, "minibatches": 4, "micro_batch_tokens": micro_batch_tokens}
    )
    trainer = fit(module)
    assert trainer.global_step == 2 * 3 * 4
    for iteration in range(2):
        for epoch in range(3):
            first = (iteration * 3 + epoch) * 4
            assert sorted(torch.cat(module.stepped_rows[first : first + 4]).tolist()) == list(range(8))
    orders = [torch.cat(module.stepped_rows[i : i + 4]).tolist() for i in range(0, 24, 4)]
    # A fresh permutation in every epoch of every iteration: the seed is fixed, so no two of the six agree by chance.
    assert len({tuple(order) for order in orders}) == 6


def by_hand(module: Recorder, shift: float) -> tuple[float, float]:
    """Policy and value loss sums with all log-probs and values moved by ``shift``, from the formulas."""
    e = module.experiences[0]
    policy = value = 0.0
    for row in range(len(e)):
        for t in range(int(e.mask[row].sum())):
            a, r = float(e.advantages[row, t]), math.exp(shift)
            policy += max(-a * r, -a * min(max(r, 0.8), 1.2))
            old, target = float(e.values[row, t]), float(e.returns[row, t])
            clipped = old + min(max(shift, -0.2), 0.2)
            value += 0.5 * max((old + shift - target) ** 2, (clipped - target) ** 2)
    return policy, value


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5, -0.5])
def test_28_and_29_policy_and_value_loss_by_hand(tiny_policy_dir, shift):
    module = one_iteration(tiny_policy_dir, optimizer={"learning_rate": 1e-12})
    e = module.experiences[0]
    new = NewScores(e.log_probs + shift, torch.zeros_like(e.log_probs), e.values + shift, None)
    policy_loss, value_loss = module.loss(new, e).sums
    expected_policy, expected_value = by_hand(module, shift)
    assert policy_loss.item() == pytest.approx(expected_policy, abs=1e-3)
    assert value_loss.item() == pytest.approx(0.1 * expected_value, rel=1e-4, abs=1e-4)


def test_30_the_total_is_policy_plus_a_tenth_of_value_and_the_gradient_is_clipped(tiny_policy_dir, monkeypatch):
    losses, clipped = [], []
    module = make_module(tiny_policy_dir, update={"micro_batch_tokens": 10_000})
    backward, before_step = module.manual_backward, module.on_before_optimizer_step

    def recording_backward(loss):
        losses.append(loss.item())
        backward(loss)

    def recording_step(optimizer):
        before_step(optimizer)
        for part in (module.policy, module.critic):
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            clipped.append(torch.nn.utils.get_total_norm(gradients).item())

    monkeypatch.setattr(module, "manual_backward", recording_backward)
    monkeypatch.setattr(module, "on_before_optimizer_step", recording_step)
    fit(module)
    logged = module.logged[0]
    assert losses == [pytest.approx(logged["policy/loss"] + 0.1 * logged["critic/loss"], abs=1e-5)]
    norms = [logged["policy/grad_norm"], logged["critic/grad_norm"]]
    assert norms[0] > 1.0
    assert clipped == [pytest.approx(min(norm, 1.0), rel=1e-4) for norm in norms]  # each by itself


def test_31_adamw_has_eps_1e_5_and_the_schedule_runs_over_optimizer_steps(tiny_policy_dir):
    module = make_module(
        tiny_policy_dir, iterations=3, update={"epochs": 2, "minibatches": 2}, optimizer={"schedule": "linear"}
    )
    fit(module)
    optimizer = module.optimizers().optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["eps"] == 1e-5
    # The rate after 4, 8 and 12 of 12 steps.
    assert [m["train/learning_rate"] for m in module.logged] == pytest.approx(
        [1e-3 * 8 / 12, 1e-3 * 4 / 12, 0.0], abs=1e-12
    )


def test_32_draws_do_not_depend_on_how_the_rows_are_split(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir)
    whole = module.generate(prompts(8), iteration=3)
    parts = [module.generate(prompts(4, start=start), iteration=3) for start in (0, 4)]
    assert whole.responses == parts[0].responses + parts[1].responses
    assert module.generate(prompts(8), iteration=4).responses != whole.responses
    module.sampler.seed = 1
    assert module.generate(prompts(8), iteration=3).responses != whole.responses


def test_33_advantages_that_do_not_vary_become_zero(tiny_policy_dir, monkeypatch):
    module = make_module(
        tiny_policy_dir,
        sampling={"max_new_tokens": 1},
        kl={"coef": 0.0},
        critic={"coef": 0.0},
        advantages={"lam": 0.0},
        update={"max_grad_norm": None},
    )
    monkeypatch.setattr(module, "score", lambda rollout: torch.zeros(len(rollout)))
    monkeypatch.setattr(
        "rlhf_lightning.training.credit.gae", lambda rewards, values, mask, *_: (mask * 2.0, torch.zeros_like(values))
    )
    fit(module)
    assert not module.experiences[0].advantages.any()
    assert all(torch.isfinite(p).all() for p in module.parameters())


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("charged", ["k1", "k2", "k3"])
def test_34_objectives_are_sums_over_tokens_and_means_over_responses(tiny_policy_dir, other_reference, charged):
    module = one_iteration(tiny_policy_dir, reference=str(other_reference), kl={"coef": 0.3, "estimator": charged})
    e, logged = module.experiences[0], module.logged[0]
    d = (e.log_probs - e.reference_log_probs).double()
    rows = [d[row, : int(e.mask[row].sum())] for row in range(len(e))]
    assert logged["objective/kl"] == pytest.approx(sum(r.sum().item() for r in rows) / 8)
    assert logged["objective/kl_k3"] == pytest.approx(sum((torch.exp(-r) - 1 + r).sum().item() for r in rows) / 8)
    log_probs = sum(e.log_probs[row, : len(r)].double().sum().item() for row, r in enumerate(rows))
    assert logged["objective/entropy"] == pytest.approx(-log_probs / 8)
    assert logged["objective/scores"] == pytest.approx(TokenReward()(module.rollouts[0]).mean().item())
    estimate = {"k1": lambda r: r, "k2": lambda r: r**2 / 2, "k3": lambda r: torch.exp(-r) - 1 + r}[charged]
    penalty = 0.3 * sum(estimate(r).sum().item() for r in rows) / 8
    assert logged["objective/non_score_reward"] == pytest.approx(-penalty)
    assert logged["objective/rlhf_reward"] == pytest.approx(logged["objective/scores"] - penalty)


def test_35_padding_does_not_deflate_the_token_metrics(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir)
    e = module.experiences[0]
    assert not e.mask.all()  # some rows are shorter
    totals = Totals()
    new = NewScores(e.log_probs + 0.1, torch.full_like(e.log_probs, 2.0), e.values, None)
    for name, (values, mask) in module.loss(new, e).metrics.items():
        totals.add(name, values, mask)
    means = totals.means()
    assert means["policy/approx_kl"] == pytest.approx(0.5 * 0.1**2, rel=1e-4)
    assert means["policy/entropy"] == pytest.approx(2.0)
    assert means["policy/ratio"] == pytest.approx(math.exp(0.1), rel=1e-5)


def test_36_the_usual_panel_is_logged(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir, update={"epochs": 2})
    logged, rollout = module.logged[0], module.rollouts[0]
    names = [
        "objective/kl",
        "objective/kl_k3",
        "objective/entropy",
        "objective/scores",
        "objective/scores_std",
        "objective/rlhf_reward",
        "objective/non_score_reward",
        "objective/kl_coef",
        "policy/approx_kl",
        "policy/clipfrac",
        "policy/entropy",
        "policy/grad_norm",
        "policy/steps",
        "critic/grad_norm",
        "policy/loss",
        "critic/loss",
        "critic/clipfrac",
        "policy/ratio",
        "policy/ratio_var",
        "rollout/num_eos_tokens",
        "critic/explained_variance",
        "rollout/entropy",
        "rollout/length",
        "rollout/max_length",
        "rollout/truncated",
        "rollout/logprob_gap",
        "rollout/tokens_per_second",
        "time/rollout",
        "time/score",
        "time/update",
        "train/learning_rate",
    ]
    assert sorted(logged) == sorted(names)
    assert all(math.isfinite(logged[name]) for name in names)
    assert logged["rollout/num_eos_tokens"] == (~rollout.truncated).sum().item()
    assert logged["rollout/length"] == pytest.approx(rollout.response_lengths.float().mean().item())
    assert logged["policy/ratio_var"] >= 0
    assert logged["policy/steps"] == 2


def test_37_validation_answers_with_the_same_draws_every_time(tiny_policy_dir):
    module = one_iteration(tiny_policy_dir, sampling={"eval_temperature": 0.0})
    seen = []
    module.report_samples = lambda rollout, scores: seen.append(rollout)
    for _ in range(2):
        module.on_validation_epoch_start()
        module.validation_step(prompts(4, start=100), 0)
    assert seen[0].responses == seen[1].responses
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    model.load_state_dict(module.policy.model.state_dict())
    row = prompts(4, start=100).tokens[0, : prompts(4, start=100).lengths[0]]
    with torch.no_grad():
        expected = model(row[None]).logits[0, -1].argmax()
    assert seen[0].tokens[0, len(row)] == expected  # temperature 0 is greedy
