"""The decode loop against transformers' generate, its draws against the distribution, and its edges."""

from __future__ import annotations

import pytest
import torch
from ppo_harness import prompts
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.models.layers import checkpoint_activations
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout.sampler import sample

EOS = 1


@pytest.fixture
def policy(tiny_policy_dir):
    return Policy(load_causal_lm(tiny_policy_dir, dtype=torch.float64))


@pytest.fixture
def sampled(policy, tiny_tokenizer):
    def run(batch, **options):
        values = {"max_new_tokens": 12, "eos_ids": [EOS], "seed": 0, "iteration": 0}
        return sample(policy, batch, tiny_tokenizer, **{**values, **options})

    return run


def test_greedy_tokens_are_those_of_generate(sampled, tiny_policy_dir):
    batch = prompts(12, padding=3)
    rollout = sampled(batch, temperature=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float64)
    for row in range(12):
        prompt = batch.tokens[row, : batch.lengths[row]]
        expected = model.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=0)[0]
        assert rollout.tokens[row, : rollout.lengths[row]].tolist() == expected.tolist()
        assert bool(rollout.truncated[row]) == (expected[-1] != EOS)


def test_a_row_is_sampled_the_same_alone_in_company_and_in_any_order(sampled):
    together = sampled(prompts(10), temperature=0.8)
    alone = [sampled(prompts(1, start=row), temperature=0.8) for row in range(10)]
    assert together.responses == [rollout.responses[0] for rollout in alone]
    for row, rollout in enumerate(alone):
        n = int(rollout.response_lengths[0])
        torch.testing.assert_close(together.log_probs[row, :n], rollout.log_probs[0])


def test_sampled_log_probs_are_those_of_the_training_forward(sampled, policy):
    rollout = sampled(prompts(10), temperature=0.7)
    scores = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths, 0.7)
    torch.testing.assert_close(scores.log_probs.float(), rollout.log_probs, atol=1e-6, rtol=1e-5)


def test_first_tokens_follow_the_distribution(sampled, policy):
    batch = prompts(1)
    rows = 6000
    many = type(batch)(
        tokens=batch.tokens.expand(rows, -1),
        lengths=batch.lengths.expand(rows),
        rows=torch.arange(rows),
        weights=torch.ones(rows),
        prompts=batch.prompts * rows,
        columns={},
    )
    rollout = sampled(many, max_new_tokens=1)
    tokens = rollout.tokens[torch.arange(rows), batch.lengths[0]]
    with torch.no_grad():
        expected = policy.model(batch.tokens[:, : batch.lengths[0]]).logits[0, -1].softmax(-1) * rows
    counts = torch.bincount(tokens, minlength=64).double()
    often = expected >= 5  # where the chi-square approximation holds; the rest goes into one cell
    cells = torch.cat([expected[often], expected[~often].sum()[None]])
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    statistic = ((seen - cells) ** 2 / cells).sum().item()
    freedom = len(cells) - 1
    # Wilson and Hilferty 1931: the 99.9% point of chi-square.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_several_ids_can_end_a_response(sampled):
    rollout = sampled(prompts(10), eos_ids=list(range(30)), max_new_tokens=30)
    assert not rollout.truncated.any()
    last = rollout.tokens[torch.arange(10), rollout.lengths - 1]
    assert (last < 30).all()


def test_nothing_follows_the_first_end(sampled):
    """An EOS at once is a response of one token; the others go on."""
    rollout = sampled(prompts(40), eos_ids=[EOS, *range(20, 40)])
    assert rollout.response_lengths.min() == 1
    assert rollout.response_lengths.max() > 1
    assert not rollout.log_probs[~rollout.response_mask].any()


def test_not_a_number_is_an_error_that_names_the_iteration(sampled, policy):
    with torch.no_grad():
        policy.model.lm_head.weight[7] = torch.nan
    with pytest.raises(TrainingDiverged, match="sampling token 0 of prompt row 3 in iteration 5"):
        sampled(prompts(2, start=3), iteration=5)


def test_a_finished_process_keeps_step_with_the_others(sampled):
    """With sharded weights every process decodes until all have finished; its own rows must not change."""
    batch = prompts(6)
    plain = sampled(batch, eos_ids=list(range(30)))
    calls = []

    def any_unfinished(going: bool) -> bool:
        calls.append(going)
        return len(calls) <= 9  # another process goes on for nine tokens

    kept = sampled(batch, eos_ids=list(range(30)), any_unfinished=any_unfinished)
    assert not all(calls)
    assert torch.equal(kept.lengths, plain.lengths)
    assert kept.responses == plain.responses


def test_gradient_checkpointing_does_not_break_decoding(sampled, policy):
    expected = sampled(prompts(4)).responses
    checkpoint_activations(policy.model)
    policy.train()
    assert sampled(prompts(4)).responses == expected
    assert policy.training


def test_casts_kept_for_a_rollout_are_dropped_before_the_weights_change(tiny_policy_dir, tiny_tokenizer):
    options = {"max_new_tokens": 6, "eos_ids": [EOS], "seed": 0, "iteration": 0}

    def rollout(policy):
        return sample(policy, prompts(4), tiny_tokenizer, **options)

    policy = Policy(load_causal_lm(tiny_policy_dir))
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # as Lightning's bf16-mixed
        before = rollout(policy)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.5)
        after = rollout(policy)
        fresh = Policy(load_causal_lm(tiny_policy_dir))
        fresh.load_state_dict(policy.state_dict())
        expected = rollout(fresh)
    assert not torch.equal(before.tokens, after.tokens) or not torch.equal(before.log_probs, after.log_probs)
    torch.testing.assert_close(after.tokens, expected.tokens)
    torch.testing.assert_close(after.log_probs, expected.log_probs)
