"""Steps on static buffers: padded and, in place of a CUDA graph's replay, run as they are on the CPU."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from rollouts import EOS, no_prompts, sample, small_policy, small_prompts
from tolerances import assert_near

from rlhf_lightning.errors import InputError
from rlhf_lightning.rollout import NativeEngine, graphs, native


class Recorded:
    """What stands for a graph: the step, and the addresses that it was recorded with."""

    def __init__(self, steps, decode, kind):
        self.steps, self.decode, self.kind = steps, decode, kind
        self.addresses = self.tensors()

    def tensors(self):
        decoding, cache = self.steps.decoding, self.steps.decoding.cache
        kept = [*vars(decoding).values(), *cache._keys, *cache._values, cache.lengths, cache._numbers]
        return [tensor.data_ptr() for tensor in kept if isinstance(tensor, torch.Tensor)]

    def __call__(self):
        assert self.tensors() == self.addresses
        self.steps.decoding.advance(self.decode, *self.kind)
        assert self.tensors() == self.addresses


@pytest.fixture
def recording(monkeypatch):
    """The engine as it is on a GPU, but for the recording; the kinds of steps that were recorded."""
    kinds = []

    def capture(steps, decode, *kind):
        kinds.append(kind)
        return Recorded(steps, decode, kind)

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


def test_what_ended_rows_are_given_does_not_outlive_their_rollout(recording):
    """Prompts longer than the window and than what is read once their rows have ended; others take their slots next."""
    policy, engine = small_policy("gemma2", sliding_window=4), NativeEngine()
    batch, short = small_prompts(16), small_prompts(13)
    tokens = torch.zeros(16, 40, dtype=torch.int64)
    tokens[:, : batch.tokens.shape[1]] = batch.tokens
    tokens[:3] = torch.arange(120).reshape(3, 40) % 40
    batch = dataclasses.replace(batch, tokens=tokens, lengths=torch.tensor([40] * 3 + short.lengths.tolist()))
    for seed in (2, 3):  # in the first rollout the long prompts' rows end while others go on for some steps
        found = sample(policy, batch, engine, seed=seed, max_new_tokens=24)
        with pytest.MonkeyPatch.context() as plainly:
            plainly.setattr(native, "can_capture", lambda policy: False)
            expected = sample(policy, batch, NativeEngine(), seed=seed, max_new_tokens=24)
        assert torch.equal(found.tokens, expected.tokens)
        assert_near(found.log_probs, expected.log_probs, torch.float32)


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


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, recording):
    policy, engine = small_policy("llama"), NativeEngine()
    for batch in (small_prompts(1) if rows else no_prompts(), small_prompts(2), no_prompts()):
        rollout = sample(policy, batch, engine)
        assert len(rollout.tokens) == len(rollout.lengths) == len(batch)


def test_casts_are_no_longer_there_for_the_next_rollout(recording):
    """Under autocast a graph reads copies of the weights that the rollout drops: it and its cache go with them."""
    policy, engine = small_policy("llama").float(), NativeEngine()
    sample(policy, small_prompts(), engine)
    assert engine._graphs is not None
    plain, recorded = len(recording), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            rollout = sample(policy, small_prompts(), engine)
            expected = sample(policy, small_prompts(), NativeEngine())
        assert engine._graphs is None
        assert torch.equal(rollout.log_probs, expected.log_probs)
        recorded.append(len(recording))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.5)
    assert recorded[1] - recorded[0] == recorded[0] - plain > 0


def test_what_validation_makes_serves_training(recording):
    """Lightning validates in inference mode, whose tensors may not be changed outside of it."""
    policy, engine = small_policy("llama"), NativeEngine()
    with torch.inference_mode():
        first = sample(policy, small_prompts(), engine)
    kept = engine._graphs
    again = sample(policy, small_prompts(), engine)
    assert kept is engine._graphs
    assert torch.equal(first.tokens, again.tokens)


def test_what_can_not_be_recorded_is_told_and_runs_as_it_is(recording, monkeypatch):
    def capture(steps, decode, *kind):
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


def test_compiled_steps_give_the_same_responses(recording, monkeypatch):
    """A few graphs for all numbers of rows and entries; traced, but run as they are: generating code takes too long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    policy, engine = small_policy("llama"), NativeEngine(compile_steps=True)
    torch._dynamo.utils.counters.clear()
    for seed in (0, 1):
        options = {"seed": seed, "eos_ids": [EOS, 9], "max_new_tokens": 20}
        found, expected = (sample(policy, small_prompts(9), e, **options) for e in (engine, NativeEngine()))
        assert torch.equal(found.tokens, expected.tokens)
        assert_near(found.log_probs, expected.log_probs, torch.float32)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4 < len(set(recording))


def test_what_can_not_be_compiled_is_told_and_runs_as_it_is():
    policy, engine = small_policy("llama"), NativeEngine(compile_steps=True)
    expected = sample(policy, small_prompts())
    policy.model.model.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM: its decode step can't be compiled .* more slowly"
    ) as warned:
        found = [sample(policy, small_prompts(), engine) for _ in range(2)]
    assert len(warned) == 1
    assert all(torch.equal(rollout.tokens, expected.tokens) for rollout in found)


def test_compiling_under_autocast_is_refused():
    policy = small_policy("llama").float()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"compile_steps: .* bf16-true or 32-true"),
    ):
        sample(policy, small_prompts(), NativeEngine(compile_steps=True))
