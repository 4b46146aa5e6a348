"""The decode loop against transformers' generate, its draws against the distribution, and its edges."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from ppo_harness import prompts
from rollouts import EOS, continued, no_prompts, sample, small_policy, small_prompts
from tiny_models import make_config
from tolerances import assert_near
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.models.layers import checkpoint_activations, computed_in
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import NativeEngine, Sampling
from rlhf_lightning.rollout.cache import SlotCache
from rlhf_lightning.rollout.decoding import prefill_groups

ARCHITECTURES = ["llama", "llama-tied", "qwen2", "gemma2", "gemma3", "gpt2", "cohere", "granite"]
WINDOWED = ["gemma2", "gemma3"]  # Gemma 2 also caps the scores of its attention and its logits


@pytest.fixture
def policy(tiny_policy_dir):
    return Policy(load_causal_lm(tiny_policy_dir, dtype=torch.float64))


@pytest.fixture
def sampled(policy):
    return lambda batch, **options: sample(policy, batch, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(name):
    """Prompts of several lengths together, against transformers' answer to each alone; the padding is no prompt's."""
    batch, policy = small_prompts(padding=3), small_policy(name)
    rollout = sample(policy, batch, temperature=0)
    for row in range(len(batch)):
        prompt = batch.tokens[row, : batch.lengths[row]]
        expected = policy.model.generate(
            prompt[None],
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0]
        assert rollout.tokens[row, : rollout.lengths[row]].tolist() == expected.tolist()
        assert bool(rollout.truncated[row]) == (expected[-1] != EOS)


def test_one_row_of_many_heads():
    """More heads than there are rows, or tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(num_attention_heads=16, num_key_value_heads=16, head_dim=4)).double()
    batch = small_prompts(1)
    rollout = sample(Policy(model), batch, temperature=0, eos_ids=[], max_new_tokens=4)
    assert rollout.tokens[0, 2:].tolist() == continued(model, batch.tokens[0, :2], 4)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_shorter_than_the_text_see_their_last_tokens(name):
    """Against a pass over the whole text for each token, so against no cache at all."""
    batch, policy = small_prompts(), small_policy(name, sliding_window=4)
    wide = small_policy(name)
    rollout = sample(policy, batch, temperature=0, eos_ids=[])
    assert rollout.tokens.tolist() != sample(wide, batch, temperature=0, eos_ids=[]).tokens.tolist()
    for row in range(len(batch)):
        start = int(batch.lengths[row])
        expected = continued(policy.model, batch.tokens[row, :start], 12)
        assert rollout.tokens[row, start : start + 12].tolist() == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_entropy_are_those_of_the_training_forward(name):
    batch, policy = small_prompts(10), small_policy(name)
    rollout = sample(policy, batch, temperature=0.7)
    with torch.no_grad():
        scores = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths, 0.7)
    assert_near(rollout.log_probs, scores.log_probs, torch.float32)
    assert_near(rollout.entropy, scores.entropy, torch.float32)


def test_log_probs_are_those_of_the_training_forward_in_float32_too(tiny_policy_dir):
    policy = Policy(load_causal_lm(tiny_policy_dir)).eval()
    rollout = sample(policy, prompts(10))
    with torch.no_grad():
        scores = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths)
    assert_near(rollout.log_probs, scores.log_probs, torch.float32, times=10)  # two orders of summing, two layers


def test_whatever_a_prefill_takes_the_responses_are_the_same(policy):
    batch = prompts(12)
    one_by_one, together = (sample(policy, batch, NativeEngine(prefill_tokens=n), temperature=0.8) for n in (1, 8192))
    assert torch.equal(one_by_one.tokens, together.tokens)
    assert_near(one_by_one.log_probs, together.log_probs, torch.float32)


def test_a_prefill_is_within_its_budget_and_has_little_padding():
    lengths = sorted([3, 40, 41, 7, 100, 8, 9, 90, 1, 2] * 20, reverse=True)
    groups = list(prefill_groups(lengths, budget=500))
    assert [row for first, last in groups for row in range(first, last)] == list(range(len(lengths)))
    for first, last in groups:
        padded, real = lengths[first] * (last - first), sum(lengths[first:last])
        assert last - first == 1 or padded <= 500
        assert padded <= 1.25 * real
    assert len(groups) < 30
    assert list(prefill_groups([], 500)) == []


def test_a_row_is_sampled_the_same_alone_in_company_and_in_any_order(sampled):
    together = sampled(prompts(10), temperature=0.8)
    alone = [sampled(prompts(1, start=row), temperature=0.8) for row in range(10)]
    assert together.responses == [rollout.responses[0] for rollout in alone]
    for row, rollout in enumerate(alone):
        n = int(rollout.response_lengths[0])
        torch.testing.assert_close(together.log_probs[row, :n], rollout.log_probs[0])


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


def test_gradient_checkpointing_does_not_break_decoding(sampled, policy):
    expected = sampled(prompts(4)).responses
    checkpoint_activations(policy.model)
    policy.train()
    assert sampled(prompts(4)).responses == expected
    assert policy.training


def test_casts_kept_for_a_rollout_are_dropped_before_the_weights_change(tiny_policy_dir):

    def rollout(policy):
        return sample(policy, prompts(4), max_new_tokens=6)

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


def test_frozen_weights_are_cast_once_a_rollout_too():
    """Under LoRA most weights are frozen; casting them for every token takes longer than the step."""
    policy, engine = small_policy("llama").float(), NativeEngine()
    add_adapter(policy.model, rank=2, alpha=4.0, targets=None, seed=0)
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    matrices = {p.data_ptr() for name, p in policy.named_parameters() if p.dim() == 2 and "embed_tokens" not in name}
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # as Lightning's bf16-mixed
        expected = sample(policy, small_prompts(), engine, eos_ids=[])
        with Casts() as casts:
            found = sample(policy, small_prompts(), engine, eos_ids=[])
    assert {casts.of[matrix] for matrix in matrices} == {1}
    assert torch.equal(found.tokens, expected.tokens)
    assert [parameter.requires_grad for parameter in policy.parameters()] == trained


class Casts(TorchDispatchMode):
    """Counts the casts to another dtype, by the address of what is cast."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._to_copy.default:
            self.of[arguments[0].data_ptr()] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("ends", [[], list(range(40))])
def test_progress_tells_the_tokens_of_the_longest_response(ends):
    policy, calls = small_policy("llama"), []
    engine, sampling = NativeEngine(), Sampling(max_new_tokens=5, eos_ids=ends)
    engine.generate(policy, small_prompts(), sampling, lambda done, total: calls.append((done, total)))
    assert calls == ([(1, 5), (5, 5)] if ends else [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)])


def test_steps_of_ever_new_sizes_are_not_left_to_cudnn(monkeypatch):
    """Whose attention makes a plan for each size; recorded steps are of few sizes."""
    policy, allowed = small_policy("llama"), []
    decode = policy.decode

    def looked(*inputs, **attention):
        allowed.append((bool(attention), torch.backends.cuda.cudnn_sdp_enabled()))
        return decode(*inputs, **attention)

    monkeypatch.setattr(policy, "decode", looked)
    sample(policy, small_prompts(), checked_engine(policy))
    assert set(allowed) == {(False, True), (True, False)}


@pytest.mark.parametrize(("kind", "products", "expected"), [
    ("cuda", "tf32", torch.float16), ("cuda", "ieee", torch.float32), ("cpu", "tf32", torch.float32),
])  # fmt: skip
def test_float32_on_a_gpu_may_have_the_digits_of_float16(kind, products, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=products))
    weight = SimpleNamespace(device=torch.device(kind), dtype=torch.float32)
    assert computed_in(SimpleNamespace(parameters=lambda: iter([weight]))) == expected


def test_rows_that_end_leave_the_batch_and_the_others_do_not_notice(policy, monkeypatch):
    """In the order that they end in, and with the cache of the last row moved into the place of the one that ended."""
    batch, ends = prompts(20), list(range(10))
    decode, sizes = policy.decode, []

    def counted(tokens, *args, **kwargs):
        if tokens.shape[1] == 1:
            sizes.append(len(tokens))
        return decode(tokens, *args, **kwargs)

    monkeypatch.setattr(policy, "decode", counted)
    rollout = sample(policy, batch, eos_ids=ends, max_new_tokens=30, engine=checked_engine(policy))
    lengths = rollout.response_lengths
    assert sizes == [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert len(set(sizes)) > 4
    with torch.no_grad():
        scores = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths)
    assert_near(rollout.log_probs, scores.log_probs, torch.float32)


def checked_engine(policy):
    """An engine that has found the policy fit before."""
    engine = NativeEngine()
    engine._checked.add(policy)
    return engine


def test_every_kind_of_bad_number_is_an_error(policy):
    with torch.no_grad():
        policy.model.lm_head.weight[7] = torch.inf
    with pytest.raises(TrainingDiverged, match="sampling token 0 of prompt row 3 in iteration 5"):
        sample(policy, prompts(2, start=3), iteration=5)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(policy, rows):
    rollout = sample(policy, prompts(4) if rows else no_prompts(), max_new_tokens=1)
    assert rollout.tokens.shape[0] == rollout.log_probs.shape[0] == (4 if rows else 0)
    assert rollout.response_lengths.tolist() == [1] * (4 * rows)


def test_a_model_with_another_cache_is_refused_by_name():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    policy = Policy(MambaForCausalLM(config))
    with pytest.raises(InputError, match=r"MambaForCausalLM: .*rlhf_lightning\.rollout\.TransformersEngine"):
        sample(policy, small_prompts())


def test_a_model_that_decodes_to_other_numbers_is_refused(monkeypatch):
    """Silent errors are what the check before the first rollout is for."""
    policy = small_policy("llama")
    policy.model.model.layers[0].self_attn.layer_idx = 1  # one layer reads and writes another's entries
    with pytest.raises(InputError, match=r"LlamaForCausalLM: .* cannot run it \(.*TransformersEngine"):
        sample(policy, small_prompts())
    mask = SlotCache.mask
    monkeypatch.setattr(SlotCache, "mask", lambda self, window, dtype: mask(self, 2, dtype))
    with pytest.raises(InputError, match=r"gives other log-probs; .*TransformersEngine"):
        sample(small_policy("llama"), small_prompts())
