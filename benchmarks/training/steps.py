"""The process of `profile_steps.py`: a few whole steps of a real module, with a clock around each operator.

It tells the time that each operator takes of a step, forward and backward, without changing what it computes. The ways:
the native operators, their references (which is the environment's to say), and ``plain``: the references, and the head
as people write it, all logits of the responses in float32.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness.clock import MIB, resident
from harness.worker import Answer, Serve
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.batches import Rollout
from rlhf_lightning.data.collate import collate
from rlhf_lightning.modules import DPOModule, PPOModule, SFTModule
from rlhf_lightning.ops import extension
from rlhf_lightning.rewards import Reward
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.sampler import RolloutOptions
from training.ours import examples, make_trainer
from training.sizes import PROFILED, Size, draw_work

WARM_UP = 2


def serve() -> Serve:
    """For `harness.worker`."""
    return {}, answer


def answer(
    task: str, size: str, precision: str, ppo: dict[str, Any], folder: str, way: str, steps: int, threads: int
) -> Answer:
    """The times of ``steps`` bare steps, and of the operators in as many others; ``ppo``: further options of it."""
    torch.set_num_threads(threads)
    chosen, clock = PROFILED[size][0], OperatorClock()
    plain = {"linear_token_log_probs": plain_log_probs(task == "ppo"), "linear_cross_entropy": plain_cross_entropy}
    for name in extension.OPERATORS:
        original = operator(name)
        replace_everywhere(original, clock.wrap(name, plain.get(name, original) if way == "plain" else original))
    count, timer = WARM_UP + 2 * steps, Steps(clock)
    module = make_module(task, folder, count, chosen.new_tokens, ppo)
    batches: Any = random_batches(folder, task, chosen, count)
    make_trainer(task, precision, timer).fit(module, DataLoader(batches, batch_size=None))
    return {
        "step_ms": timer.bare,
        "clocked_step_ms": timer.clocked,
        "peak_mib": [resident("VmHWM") / MIB],
        "phases": timer.phases,
        "operators": timer.operators,
    }


class EvenTokens(Reward):
    """The share of tokens with an even id: costs nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return (rollout.tokens % 2 == 0).float().mean(dim=1)


def make_module(task: str, folder: str, iterations: int, new_tokens: int, ppo: dict[str, Any]) -> Any:
    """PPO's reward costs nothing; ``ppo``: see `training.sizes.PROFILED`."""
    if task != "ppo":
        return {"sft": SFTModule, "dpo": DPOModule}[task](folder)
    update = dict(ppo)
    filters = {name: update.pop(name) for name in ("top_k", "top_p") if name in update}
    return PPOModule(
        folder,
        EvenTokens(),
        iterations=iterations,
        sampling=RolloutOptions(max_new_tokens=new_tokens, **filters),
        critic=CriticOptions(kind=update.pop("critic", "model")),
        update=UpdateOptions(**update),
    )


class Steps(Callback):
    """Times the steps, every second one with the clock on."""

    def __init__(self, clock: OperatorClock) -> None:
        self.clock = clock
        self.bare: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.clocked: list[float] = []
        self.operators: list[dict[str, dict[str, float]]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.clock.restart()
        self.clock.on = batch_idx >= WARM_UP and (batch_idx - WARM_UP) % 2 == 1
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        took = 1e3 * (time.perf_counter() - self.began)
        if self.clock.on:
            self.clocked.append(took)
            self.operators.append({name: dict(spent) for name, spent in self.clock.spent.items()})
        elif batch_idx >= WARM_UP:
            self.bare.append(took)
            phases = getattr(module, "phases", None)
            seconds = phases.seconds if phases is not None else {}
            self.phases.append({name: 1e3 * value for name, value in seconds.items()})


def random_batches(folder: str, task: str, size: Size, count: int) -> list[Any]:
    """Random tokens and lengths, fresh in every batch."""
    pad_id = PreTrainedTokenizerFast.from_pretrained(folder).pad_token_id
    drawn = [examples(task, draw_work(size, seed)) for seed in range(count)]
    return [collate(rows, kind, pad_id) for kind, rows in drawn]


# The clock


class OperatorClock:
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
    clock: OperatorClock
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


# The head as people write it


def plain_log_probs(entropy_logged: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, weight).float()
        log_p = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        log_probs = log_p.gather(-1, tokens[:, None])[:, 0]
        with torch.no_grad():
            wanted = entropy_logged and log_probs.requires_grad
            entropy = -(log_p.exp() * log_p).sum(-1) if wanted else torch.zeros_like(log_probs)
        return log_probs, entropy

    return function


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, token_weights: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    logits = functional.linear(hidden, weight).float()
    logits = logits if temperature == 1.0 else logits / temperature
    losses = functional.cross_entropy(logits, tokens, reduction="none")
    return (token_weights * losses).sum(), -losses.detach(), torch.zeros_like(losses)
