"""A small call of every operator, to be made on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from ops.support import randint, randn
from torch import Tensor

from rlhf_lightning import ops


@dataclass(frozen=True)
class Call:
    """A public operator with its arguments: tensors, the first ``trained`` of which get a gradient, then numbers."""

    operator: str
    tensors: tuple[Tensor, ...]
    numbers: tuple[Any, ...]
    trained: int

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.operator)

    def to(self, device: torch.device | str) -> Call:
        return replace(self, tensors=tuple(tensor.to(device) for tensor in self.tensors))

    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors, afresh: no graph hangs on them, and those that are trained ask for a gradient."""
        return tuple(x.detach().requires_grad_(i < self.trained) for i, x in enumerate(self.tensors))

    def outputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.function(*tensors, *self.numbers))

    def run(self, upstream: list[Tensor] | None = None) -> list[Tensor]:
        """The outputs, then the gradients of a weighted sum of those that have one, by default a fixed one."""
        leaves = self.leaves()
        outputs = self.outputs(*leaves)
        with_grad = [x for x in outputs if x.requires_grad]
        weights = cotangents(with_grad) if upstream is None else upstream
        grads = torch.autograd.grad(with_grad, leaves[: self.trained], weights) if self.trained else ()
        return [x.detach() for x in (*outputs, *grads)]


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Fixed random gradients of the outputs."""
    return [randn(*x.shape, dtype=x.dtype, seed=90 + i).to(x.device) for i, x in enumerate(outputs)]


def make_gae(rows: int, steps: int, dtype: torch.dtype = torch.float32, holes: bool = True) -> Call:
    mask = randn(rows, steps, seed=3) > (-0.8 if holes else -9.0)
    tensors = (randn(rows, steps, dtype=dtype, seed=1), randn(rows, steps, dtype=dtype, seed=2), mask)
    return Call("gae", tensors, (0.99, 0.95), 0)


def make_token_log_probs(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Call:
    tensors = (randn(rows, vocabulary, dtype=dtype, scale=scale), randint(vocabulary, rows, seed=1))
    return Call("token_log_probs", tensors, (0.8,), 1)


def make_linear(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Call:
    hidden, weight = randn(rows, width, dtype=dtype, seed=1), randn(vocabulary, width, dtype=dtype, seed=2)
    return Call("linear_token_log_probs", (hidden, weight, randint(vocabulary, rows, seed=3)), (0.8,), 2)


def make_cross_entropy(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Call:
    hidden, weight, tokens = make_linear(rows, width, vocabulary, dtype).tensors
    weights = randn(rows, seed=4).abs() * (randn(rows, seed=5) > -0.5)  # some tokens do not count
    return Call("linear_cross_entropy", (hidden, weight, tokens, weights.to(result(dtype))), (0.8,), 2)


def make_policy_loss(*shape: int, dtype: torch.dtype = torch.float32, dual: float | None = 1.5) -> Call:
    first = randn(*shape, dtype=torch.float64)
    second = first + 0.5 * randn(*shape, dtype=torch.float64, seed=1)
    tensors = (first.to(dtype), second.to(dtype), randn(*shape, dtype=dtype, seed=2))
    return Call("clipped_policy_loss", tensors, (0.2, 0.28, dual), 1)


def make_value_loss(*shape: int, dtype: torch.dtype = torch.float32, clip: float | None = 0.2) -> Call:
    return Call("clipped_value_loss", make_policy_loss(*shape, dtype=dtype).tensors, (clip,), 1)


def make_sampling(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Call:
    draws = torch.linspace(0.02, 0.98, rows, dtype=torch.float64)
    return Call("sample_tokens", (randn(rows, vocabulary, dtype=dtype, seed=6), draws), (0.8, 50, 0.9), 0)


def result(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the outputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def small(dtype: torch.dtype = torch.float32) -> list[Call]:
    """One call of every operator, of sizes that fill no vector evenly."""
    return [
        make_gae(5, 37, dtype),
        make_token_log_probs(7, 131, dtype),
        make_linear(7, 16, 131, dtype),
        make_cross_entropy(7, 16, 131, dtype),
        make_policy_loss(3, 67, dtype=dtype),
        make_value_loss(3, 67, dtype=dtype),
        make_sampling(7, 131, dtype),
    ]


SMALL = {call.operator: call for call in small()}
EVERY = sorted(SMALL)
