"""Steps on static buffers: padded and, in place of a CUDA graph's replay, run as they are on the CPU."""

from __future__ import annotations

import weakref

import pytest
import torch
from rollouts import EOS, sample, small_policy, small_prompts
from tolerances import assert_near

from rlhf_lightning.rollout import NativeEngine, graphs, native


class Recorded:
    """What stands for a graph: the step, and the addresses that it was recorded with."""

    def __init__(self, steps, policy, kind):
        self.steps, self.policy, self.kind = steps, weakref.proxy(policy), kind
        self.addresses = self.tensors()

    def tensors(self):
        decoding, cache = self.steps.decoding, self.steps.decoding.cache
        kept = [*vars(decoding).values(), *cache._keys, *cache._values, cache.lengths, cache._numbers]
        return [tensor.data_ptr() for tensor in kept if isinstance(tensor, torch.Tensor)]

    def __call__(self):
        assert self.tensors() == self.addresses
        self.steps.decoding.advance(self.policy, *self.kind)
        assert self.tensors() == self.addresses


@pytest.fixture
def recording(monkeypatch):
    """The engine as it is on a GPU, but for the recording; the kinds of steps that were recorded."""
    kinds = []

    def capture(steps, policy, *kind):
        kinds.append(kind)
        return Recorded(steps, policy, kind)

    monkeypatch.setattr(native, "can_capture", lambda policy: True)
    monkeypatch.setattr(graphs, "_ENTRIES", 8)
    monkeypatch.setattr(graphs.StepGraphs, "capture", capture)
    return kinds


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_padded_steps_on_static_buffers_give_the_same_responses(name, recording, monkeypatch):
    policy, engine = small_policy(name, sliding_window=6), NativeEngine()
    # Three rollouts with the same buffers: fewer rows, shorter prompts and another seed among them.
    for rows, seed in ((9, 0), (9, 1), (5, 2)):
        options = {"seed": seed, "eos_ids": [EOS, 9], "max_new_tokens": 30}
        found = sample(policy, small_prompts(rows), engine, **options)
        with monkeypatch.context() as plainly:
            plainly.setattr(native, "can_capture", lambda policy: False)
            expected = sample(policy, small_prompts(rows), NativeEngine(), **options)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.lengths, expected.lengths)
        assert torch.equal(found.truncated, expected.truncated)
        assert_near(found.log_probs, expected.log_probs, torch.float32)
        assert_near(found.entropy, expected.entropy, torch.float32)
    assert len(recording) == len(set(recording)), "a kind of step was recorded anew"
    assert {rows for rows, _ in recording} > {9}
    assert all(read % 8 == 0 for _, read in recording)


def test_other_options_or_weights_elsewhere_are_recorded_anew(recording):
    policy, engine = small_policy("llama"), NativeEngine()
    kept = []
    for options in ({}, {"iteration": 4}, {"temperature": 0.5}, {"temperature": 0.5, "top_k": 3}):
        sample(policy, small_prompts(), engine, **options)
        kept.append(engine._graphs)
    assert kept[0] is kept[1]
    assert len({id(graphs) for graphs in kept}) == 3
    policy.model.lm_head.weight.data = policy.model.lm_head.weight.data.clone()
    sample(policy, small_prompts(), engine, temperature=0.5, top_k=3)
    assert engine._graphs is not kept[-1]
    kept.append(engine._graphs)
    sample(policy, small_prompts(7), engine, temperature=0.5, top_k=3)
    assert engine._graphs is not kept[-1]


def test_what_can_not_be_recorded_is_told_and_runs_as_it_is(recording, monkeypatch):
    def capture(steps, policy, *kind):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    policy = small_policy("llama")
    expected = sample(policy, small_prompts())
    monkeypatch.setattr(graphs.StepGraphs, "capture", capture)
    with pytest.warns(UserWarning, match="can't be recorded .*not permitted when stream.* more slowly") as warned:
        found = sample(policy, small_prompts(), NativeEngine())
    assert len(warned) == 1
    assert torch.equal(found.tokens, expected.tokens)


def test_steps_on_a_cpu_are_not_recorded():
    policy, engine = small_policy("llama"), NativeEngine()
    sample(policy, small_prompts(), engine)
    assert engine._graphs is None
