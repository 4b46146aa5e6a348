"""Rollouts on the GPU: recorded and compiled steps give what plain ones and the CPU give."""

from __future__ import annotations

import warnings

import pytest
import torch
from rollouts import EOS, sample, small_policy, small_prompts
from tolerances import assert_near

from rlhf_lightning.rollout import NativeEngine

OPTIONS = {"eos_ids": [EOS, 9], "max_new_tokens": 40}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_recorded_steps_give_the_responses_of_the_cpu(device, name):
    """Twice with the same engine: the second time all graphs are there."""
    policy, batch = small_policy(name), small_prompts(9)
    expected = [sample(policy, batch, seed=seed, **OPTIONS) for seed in (0, 1)]
    policy, engine = policy.to(device), NativeEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that can't be recorded warns
        found = [sample(policy, batch.to(device), engine, seed=seed, **OPTIONS) for seed in (0, 1)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.tokens.cpu(), theirs.tokens)
        assert_near(ours.log_probs.cpu(), theirs.log_probs, torch.float32)
    if device.type == "cuda":
        assert engine._graphs is not None and engine._graphs._graphs


@pytest.mark.parametrize("autocast", [False, True])
def test_recorded_steps_in_bfloat16(device, autocast):
    """Against the training forward, whose sums are in another order."""
    policy, batch, engine = small_policy("llama").float().to(device), small_prompts(9).to(device), NativeEngine()
    policy = policy if autocast else policy.bfloat16()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
        rollouts = [sample(policy, batch, engine, seed=seed, **OPTIONS) for seed in (0, 1)]
        with torch.no_grad():
            scores = [policy(x.tokens, x.lengths, x.prompt_lengths).log_probs for x in rollouts]
    for rollout, score in zip(rollouts, scores, strict=True):
        assert (rollout.log_probs - score).abs().max() < 0.5  # bf16 through three layers of large weights


@pytest.mark.parametrize("autocast", [False, True])
def test_recorded_steps_read_the_weights_as_they_are(device, autocast):
    policy, batch, engine = small_policy("llama").float().to(device), small_prompts(9).to(device), NativeEngine()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
        before = sample(policy, batch, engine, **OPTIONS)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.5)
        found, expected = (sample(policy, batch, e, **OPTIONS) for e in (engine, NativeEngine()))
    assert torch.equal(found.tokens, expected.tokens)
    assert_near(found.log_probs, expected.log_probs, torch.bfloat16 if autocast else torch.float32)
    assert not torch.equal(found.log_probs, before.log_probs)
    assert not autocast or engine._graphs is None


def test_what_can_not_be_recorded_leaves_the_gpu_as_it_was(gpu):
    """The stream, the allocator and the random numbers; and what can be recorded after it is."""
    policy, batch = small_policy("llama"), small_prompts(9)
    expected = sample(policy, batch, **OPTIONS)
    policy, batch, stream = policy.to(gpu), batch.to(gpu), torch.cuda.current_stream()
    waiting = policy.model.model.layers[1].register_forward_hook(wait)
    with pytest.warns(UserWarning, match="can't be recorded"):
        found = [sample(policy, batch, NativeEngine(), **OPTIONS)]
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    torch.rand(3, device=gpu)
    waiting.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found += [sample(policy, batch, NativeEngine(cuda_graphs=on), **OPTIONS) for on in (True, False)]
    assert all(torch.equal(rollout.tokens.cpu(), expected.tokens) for rollout in found)


def wait(module, arguments, output):
    """For the GPU, which a recording may not."""
    torch.cuda.synchronize()


def test_policies_are_not_refused_for_what_tf32_rounds(gpu):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rollout = sample(small_policy("llama").float().to(gpu), small_prompts(9).to(gpu), **OPTIONS)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert rollout.log_probs.isfinite().all()


def test_compiled_steps(gpu):
    policy, batch = small_policy("llama"), small_prompts(9)
    expected = sample(policy, batch, **OPTIONS)
    found = sample(policy.to(gpu), batch.to(gpu), NativeEngine(compile_steps=True), **OPTIONS)
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    assert_near(found.log_probs.cpu(), expected.log_probs, torch.float32)
