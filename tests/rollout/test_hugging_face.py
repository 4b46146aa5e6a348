"""Transformers' generation as an engine: the native engine's responses, and models that only it can run."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from rollouts import continued, sample, small_policy, small_prompts
from tolerances import assert_near
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import TransformersEngine


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_both_engines_give_the_same_responses(name, temperature):
    policy, batch = small_policy(name, sliding_window=4), small_prompts(10)
    options = {"temperature": temperature, "eos_ids": list(range(12)), "max_new_tokens": 9}
    theirs, ours = sample(policy, batch, TransformersEngine(), **options), sample(policy, batch, **options)
    assert torch.equal(theirs.tokens, ours.tokens)
    assert torch.equal(theirs.lengths, ours.lengths)
    assert torch.equal(theirs.truncated, ours.truncated)
    assert len(set(theirs.response_lengths.tolist())) > 1
    assert theirs.responses == ours.responses
    assert_near(theirs.log_probs, ours.log_probs, torch.float32)
    assert_near(theirs.entropy, ours.entropy, torch.float32)


def test_a_state_space_model_is_sampled_from():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0, initializer_range=0.5
    )
    policy = Policy(MambaForCausalLM(config).double())
    batch = small_prompts()
    rollout = sample(policy, batch, TransformersEngine(), temperature=0, eos_ids=[])
    for row in range(len(batch)):
        start = int(batch.lengths[row])
        expected = continued(policy.model, batch.tokens[row, :start], 12)
        assert rollout.tokens[row, start : start + 12].tolist() == expected
    rollout = sample(policy, batch, TransformersEngine(), temperature=0.9)
    with torch.no_grad():
        scores = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths, 0.9)
    assert_near(rollout.log_probs, scores.log_probs, torch.float32)


def test_a_model_whose_generation_computes_something_else_is_refused(monkeypatch):
    """RWKV's does, where it answers two prompts at once."""
    policy, batch = small_policy("llama"), small_prompts()
    whole = policy.model.forward

    def other_while_decoding(*inputs, past_key_values=None, **options):
        out = whole(*inputs, past_key_values=past_key_values, **options)
        if past_key_values is not None and len(out.logits) > 1:
            out.logits = out.logits * 1.01
        return out

    monkeypatch.setattr(policy.model, "forward", other_while_decoding)
    with pytest.raises(InputError, match=r"LlamaForCausalLM: transformers' generation gives .* by up to 0\.\d+"):
        sample(policy, batch, TransformersEngine())


def test_a_policy_is_checked_once(monkeypatch):
    checked, check = [], TransformersEngine._check
    monkeypatch.setattr(TransformersEngine, "_check", lambda own, policy: checked.append(policy) or check(own, policy))
    policies, engine = [small_policy("llama"), small_policy("llama")], TransformersEngine()
    for policy in (policies[0], policies[0], policies[1], policies[0]):
        sample(policy, small_prompts(2), engine, max_new_tokens=1)
    assert [id(policy) for policy in checked] == [id(policy) for policy in policies]


def test_a_vocabulary_may_have_fewer_ids_than_the_check_asks_with():
    model, batch = build("llama"), small_prompts()
    model.resize_token_embeddings(4)
    policy, batch.tokens = Policy(model).eval(), batch.tokens % 4
    theirs, ours = sample(policy, batch, TransformersEngine()), sample(policy, batch)
    assert torch.equal(theirs.tokens, ours.tokens)


def test_the_models_own_generation_config_changes_nothing():
    policy, batch = small_policy("llama"), small_prompts()
    plain = sample(policy, batch, TransformersEngine())
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=8, suppress_tokens=[7, 8, 9])
    policy.model.generation_config = own
    assert torch.equal(sample(policy, batch, TransformersEngine()).tokens, plain.tokens)
    assert policy.model.generation_config is own


def test_not_a_number_is_an_error_that_names_the_iteration():
    policy = small_policy("llama")
    with torch.no_grad():
        policy.model.lm_head.weight[7] = torch.nan
    with pytest.raises(TrainingDiverged, match="sampling token 0 of prompt row 0 in iteration 5"):
        sample(policy, small_prompts(), TransformersEngine(), iteration=5)
