"""The time that each operator takes of a step, forward and backward, told without changing what it computes."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Adds up the time in the calls it wraps, while it is on: ``{name: {"calls", "forward_ms", "backward_ms"}}``."""

    def __init__(self) -> None:
        self.on = False
        self.restart()

    def restart(self) -> None:
        self.spent: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "forward_ms": 0, "backward_ms": 0})

    def add(self, name: str, part: str, began: float) -> None:
        self.spent[name][part] += 1e3 * (time.perf_counter() - began)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            self.spent[name]["calls"] += 1
            call = _Call(self, name)
            if torch.is_grad_enabled():
                args = call.through(_Enter, args)
            began = time.perf_counter()
            results = function(*args, **kwargs)
            self.add(name, "forward_ms", began)
            return call.through(_Leave, results) if isinstance(results, tuple) else results

        return timed


@dataclass
class _Call:
    clock: Clock
    name: str
    began: float = 0.0

    def through(self, mark: type[torch.autograd.Function], values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values, those with a gradient marked, so that the backward pass tells when it is there."""
        learning = [isinstance(value, Tensor) and value.requires_grad for value in values]
        if not any(learning):
            return values
        marked = iter(mark.apply(self, *(value for value, yes in zip(values, learning, strict=True) if yes)))
        return tuple(next(marked) if yes else value for value, yes in zip(values, learning, strict=True))


class _Leave(torch.autograd.Function):
    """At a call's results: its backward begins here."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)  # a result that is not used must stay without gradient
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call.began = time.perf_counter()
        return None, *grads


class _Enter(_Leave):
    """At a call's arguments: and it ends here."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call.clock.add(ctx.call.name, "backward_ms", ctx.call.began)
        return None, *grads


def replace_everywhere(old: Any, new: Any) -> None:
    """Put ``new`` where the package's modules have imported ``old``."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlhf_lightning"):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def operator(name: str) -> Callable[..., Any]:
    """An operator's public function. (``ops.gae`` may be the function or the file it is in.)"""
    return getattr(sys.modules[f"rlhf_lightning.ops.{name}"], name)
