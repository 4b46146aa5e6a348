"""Compiled layers give what the layers give, and sampling runs them as they are."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from packaging.version import Version
from torch import Tensor

from rlhf_lightning.models.compilation import compile_layers
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout.engine import ready_to_decode

LENGTHS = torch.tensor([9, 5, 6, 3])
PROMPTS = torch.tensor([4, 2, 1, 3])
TOKENS = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(5))


def gradients(policy: Policy, rows: slice) -> dict[str, Tensor]:
    """Of everything that a pass over the rows gives; ``policy``'s values among it."""
    policy.zero_grad()
    scores = policy(TOKENS[rows], LENGTHS[rows], PROMPTS[rows])
    (scores.log_probs.square().sum() + scores.entropy.sum() + scores.values.square().sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def graphs() -> int:
    """How many the process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.xfail(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.10 to 2.12 compile the backward pass of attention in float64 for other types on a CPU",
    strict=True,
)
def test_gradients_are_those_of_the_layers() -> None:
    policy = Policy(build("llama-tied"), "head").train()
    padded, packed = slice(0, 1), slice(0, 4)  # a single row has no padding to leave out
    expected = [gradients(policy, padded), gradients(policy, packed)]
    torch._dynamo.reset()
    compile_layers(policy)
    before = graphs()
    for rows, wanted in zip((padded, packed), expected, strict=True):
        got = gradients(policy, rows)
        assert graphs() > before
        before = graphs()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_once_for_any_number_of_rows_and_tokens() -> None:
    policy = Policy(build("llama-tied"), "head").train()
    compile_layers(policy)

    def run(rows: int, width: int, shortest: int = 1) -> None:
        lengths = LENGTHS[:rows].clamp(min=shortest, max=width)
        policy(TOKENS[:rows, :width], lengths, PROMPTS[:rows])

    run(4, 9)
    run(4, 7, shortest=7)  # nothing to leave out
    before = graphs()
    for rows, width in ((4, 8), (3, 9), (4, 6)):
        run(rows, width)
    for rows, width in ((3, 9), (2, 5)):
        run(rows, width, shortest=width)
    assert graphs() == before


def test_sampling_runs_the_layers_as_they_are() -> None:
    policy = Policy(build("llama-tied")).eval()
    compile_layers(policy)
    layer = policy.model.base_model.layers[0]
    assert layer._compiled_call_impl is not None
    with ready_to_decode(policy):
        assert not any(part._compiled_call_impl for part in policy.modules())
        before = graphs()
        policy(TOKENS[:2], LENGTHS[:2], PROMPTS[:2])
        assert graphs() == before
    assert layer._compiled_call_impl is not None
