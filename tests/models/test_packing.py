"""Passes without padding give what padded ones do, and the layers really see the real tokens alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from architectures import build
from torch import Tensor, nn

from rlhf_lightning.models.layers import checkpoint_activations
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.packing import can_pack
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel

LENGTHS = torch.tensor([9, 5, 6, 3])
PROMPTS = torch.tensor([4, 2, 1, 3])  # the last response is empty
TOKENS = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(5))
ALIKE = TOKENS.clone()  # 3 of the 23 tokens begin row 0 and row 2, and 2 of these also row 1; nothing begins row 3
ALIKE[2, :3] = ALIKE[0, :3]
ALIKE[1, :2] = ALIKE[0, :2]
ALIKE[[1, 2, 3], [2, 3, 0]] = torch.tensor([1, 2, 1])
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# Norms compute in float32 in every model, and sum their weights' gradients up in it.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}


def assert_rounded(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """`ROUNDED` of gradients of any size: those of `ALIKE` are larger than 50."""
    assert got.keys() == expected.keys() and len(expected) > 5
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


def policy_of(name: str, critic: object = None) -> Policy:
    """The Gemmas look back 3 tokens in some layers, which is less than the rows have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Policy(build(name, sliding_window=3), critic)


def everything(policy: Policy, tokens: Tensor = TOKENS) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a pass gives, and the gradients of all of it."""
    policy.zero_grad()
    scores = policy(tokens, LENGTHS, PROMPTS, 0.8)
    weights = torch.arange(1.0, 21.0, dtype=torch.float64).view(4, 5) * (scores.log_probs != 0)
    loss, _ = policy.cross_entropy(tokens, LENGTHS, PROMPTS, weights)
    total = loss + (weights * scores.log_probs).sum() + scores.entropy.sum()
    if scores.values is not None:
        total = total + scores.values.square().sum()
    total.backward()
    found = [scores.log_probs, scores.entropy, loss] + ([] if scores.values is None else [scores.values])
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return [x.detach() for x in found], gradients


def compare(policy: Policy, tokens: Tensor = TOKENS) -> None:
    assert policy.packs
    got, gradients = everything(policy, tokens)
    policy.packs = False
    expected, wanted = everything(policy, tokens)
    policy.packs = True
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert_rounded(gradients, wanted)
    for name, gradient in wanted.items() if tokens is TOKENS else ():
        torch.testing.assert_close(gradients[name], gradient, **ROUNDED, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma3", "gpt2", "cohere", "granite"])
def test_log_probs_and_gradients_are_those_of_padded_rows(name: str) -> None:
    policy = policy_of(name, "head")
    compare(policy)
    compare(policy, ALIKE)


def test_adapters_too() -> None:
    model = build("qwen2")
    add_adapter(model, 2, 4.0)
    compare(Policy(model))


def test_checkpointed_layers_run_again_without_padding() -> None:
    policy = policy_of("gemma3").train()
    expected, wanted = everything(policy)
    checkpoint_activations(policy.model)
    got, gradients = everything(policy)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, **EXACT)
    assert policy.model.config._attn_implementation == "sdpa"


def seen_by(module: nn.Module, layer: nn.Module, *inputs: Tensor) -> list[tuple[int, ...]]:
    """The shapes that a layer's inputs had, but for their width."""
    shapes: list[tuple[int, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape[:2])))
    module(*inputs)
    hook.remove()
    return shapes


def test_layers_see_real_tokens_alone_where_that_is_worth_it() -> None:
    policy = policy_of("llama")
    layer = policy.model.model.layers[0].mlp.gate_proj
    assert seen_by(policy, layer, TOKENS, LENGTHS, PROMPTS) == [(1, 23)]
    assert seen_by(policy, layer, TOKENS, torch.full((4,), 9), PROMPTS) == [(4, 9)]
    policy.packs = False
    assert seen_by(policy, layer, TOKENS, LENGTHS, PROMPTS) == [(4, 9)]


def test_what_rows_begin_with_alike_is_computed_once() -> None:
    policy = policy_of("llama")
    layer = policy.model.model.layers[0].mlp.gate_proj
    assert seen_by(policy, layer, ALIKE, LENGTHS, PROMPTS) == [(1, 23 - 3 - 2)]
    assert seen_by(policy, layer, ALIKE[[0, 0, 2, 0]], torch.tensor([9, 9, 6, 4]), PROMPTS) == [(1, 9 + 3)]
    assert seen_by(policy, layer, ALIKE[[0, 0]], torch.tensor([9, 9]), PROMPTS[:2]) == [(1, 9)]  # without any padding
    # What stands past a row's end is nothing that it begins with.
    assert seen_by(policy, layer, TOKENS[[0, 0]], torch.tensor([4, 9]), PROMPTS[:2]) == [(1, 9)]


def test_models_that_cannot_be_packed_are_run_padded() -> None:
    policy = policy_of("gemma2")  # its attention caps its scores, which the packed one's does not
    assert not policy.packs
    log_probs = policy(TOKENS, LENGTHS, PROMPTS).log_probs
    torch.testing.assert_close(policy(TOKENS[:1], LENGTHS[:1], PROMPTS[:1]).log_probs[0], log_probs[0], **EXACT)


def test_packing_is_tried_where_the_model_is() -> None:
    """Lightning builds models under the training device, for which ``meta`` stands in, and they are on the CPU yet."""
    model = build("llama")
    with torch.device("meta"):
        assert can_pack(model.base_model)


def test_scores_of_reward_models(tiny_reward_dir: str) -> None:
    scalar = ScalarModel(load_scalar_model(tiny_reward_dir, fresh_head=False, dtype=torch.float64))
    assert scalar.packs
    got = scalar(TOKENS, LENGTHS)
    scalar.packs = False
    torch.testing.assert_close(got, scalar(TOKENS, LENGTHS), **EXACT)


@pytest.mark.parametrize("lengths", [[0, 0], [0, 9], [9, 0], [0, 2]])
def test_rows_without_a_token(lengths: list[int]) -> None:
    policy = policy_of("gemma3")
    assert policy.packs
    scores = policy(TOKENS[:2], torch.tensor(lengths), torch.zeros(2, dtype=torch.int64) + 1)
    assert bool(torch.isfinite(scores.log_probs).all())


def test_scores_of_rows_that_begin_alike(tiny_reward_dir: str) -> None:
    model = build("qwen2")
    add_adapter(model, 2, 4.0)
    compare(Policy(model), ALIKE)
    policy = policy_of("gemma3").train()
    checkpoint_activations(policy.model)
    compare(policy, ALIKE)
    scalar = ScalarModel(load_scalar_model(tiny_reward_dir, fresh_head=False, dtype=torch.float64))
    found = []
    for scalar.packs in (True, False):
        scalar.zero_grad()
        scores = scalar(ALIKE, LENGTHS)
        scores.square().sum().backward()
        found.append(
            (scores.detach(), {name: p.grad.clone() for name, p in scalar.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[0][0], found[1][0], **EXACT)
    assert_rounded(found[0][1], found[1][1])
