"""Who takes part in which task of `bench_training.py`, the process of a side, and the limit of the machine.

The limit is the least that a step of ours can take: its bare matrix products, and the bytes it must move. Measured by
the products of the model's own shapes, on no padding and on a pair's prompt once, each layer with weights of its own
and into results that are already there; backward passes as two products each; the optimizer's step at the bandwidth of
a copy (parameter, gradient and two moments in; parameter and moments out). Attention's own products, norms and
activations are left out, so no program reaches this. On a GPU a decoding step is limited by the bytes of weights and
cache.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness.clock import Meter, copy_bandwidth, median_seconds
from harness.worker import NATIVE, Answer, Serve, once
from torch import Tensor

from training.sizes import PRECISIONS, TASKS, Size, size_of, work

OURS, LIMITS = "ours", "limits"
TRL_PPO = "TRL 1.12.0 PPO"
PLAIN = "plain PyTorch"
TRL = "TRL 1.16.0"
TIME_LIMIT = 1800.0  # seconds of one process


@dataclass(frozen=True)
class Entrant:
    """``module``: the file here with its `run`; ``compiled``: what that is called with where layers are compiled."""

    module: str
    tasks: tuple[str, ...]
    folder: str | None = None  # of build/peers
    packages: tuple[str, ...] = ()  # whose versions are reported
    compiled: dict[str, Any] = field(default_factory=dict)


ENTRANTS = {
    OURS: Entrant("ours", TASKS, packages=("lightning",), compiled={"compile_layers": True}),
    TRL_PPO: Entrant("trl_sides", ("ppo",), "trl_ppo", ("trl", "accelerate")),
    PLAIN: Entrant("plain_ppo", ("ppo",)),
    TRL: Entrant("trl_sides", TASKS[1:], "trl", ("trl", "accelerate"), compiled={"torch_compile": True}),
}


def measure(name: str, work: dict[str, Any], folder: Path, steps: tuple[int, int, int]) -> Answer:
    """One process of a side, or the limits; raises Refused.

    ``work``: task, size, device, precision, threads, compile and seed; ``steps``: see `Meter`.
    """
    question = {"name": name, **work, "steps": steps, "folder": str(folder)}
    peer = None if name == LIMITS else ENTRANTS[name].folder
    start = {"folder": peer, "environment": NATIVE if name == OURS else {}, "limit": TIME_LIMIT}
    return once("training.entrants", question, threads=work["threads"], **start)


# The process


def serve() -> Serve:
    """For `harness.worker`."""
    from transformers.models.llama import modeling_llama  # noqa: F401, so that it counts among the libraries

    return {}, answer


def answer(
    name: str,
    task: str,
    size: str,
    device: str,
    precision: str,
    threads: int,
    compile: bool,
    steps: tuple[int, int, int],
    folder: str,
    seed: int = 0,
) -> Answer:
    """What `measure` asks."""
    torch.set_num_threads(threads)
    place = (task, size_of(size, device), Path(folder), device, precision)
    if name == LIMITS:
        return limits(*place)
    torch.manual_seed(seed)
    entrant = ENTRANTS[name]
    side = importlib.import_module(f"training.{entrant.module}")
    names = (*entrant.packages, "torch", "transformers")
    versions = {package: importlib.metadata.version(package) for package in names}
    meter = Meter(device, *steps, rest="other" if task == "ppo" else "update")
    measured = side.run(*place, meter, seed, **(entrant.compiled if compile else {}))
    return {**measured, "versions": versions}


# The limit of the machine


class Machine:
    """The weights of a model, and the times of products with them."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype, trained: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype  # of the products
        self.trained = trained  # what the optimizer has the weights in
        head = size.hidden // size.heads
        wide, narrow = size.heads * head, size.kv_heads * head
        shapes = [(wide, size.hidden), (narrow, size.hidden), (narrow, size.hidden), (size.hidden, wide)]
        shapes += [(size.intermediate, size.hidden)] * 2 + [(size.hidden, size.intermediate)]
        self.layers = [self._random(*shape) for _ in range(size.layers) for shape in shapes]
        self.head = self._random(size.vocabulary, size.hidden)
        self.bytes_a_second = copy_bandwidth(device)

    @property
    def trunk_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.layers)

    def parameters(self, head: bool = True) -> int:
        """Of the products, with the embedding (which is the head, tied)."""
        return sum(weight.numel() for weight in self.layers) + head * self.head.numel()

    def trunk(self, rows: int, backward: bool = False) -> float:
        """Seconds of the trunk's products on ``rows`` tokens; with ``backward`` those of both passes."""
        return self._products(self.layers, rows, backward)

    def logits(self, rows: int, backward: bool = False) -> float:
        """Seconds of the head's products on ``rows`` tokens."""
        return self._products([self.head], rows, backward)

    def _products(self, weights: list[Tensor], rows: int, backward: bool) -> float:
        results = {weight.shape: torch.empty(rows, weight.shape[0], **self._like) for weight in weights}
        inputs = {weight.shape: self._random(rows, weight.shape[1]) for weight in weights}
        back = {weight.shape: torch.empty_like(inputs[weight.shape]) for weight in weights} if backward else {}
        grads = {weight.shape: torch.empty_like(weight) for weight in weights} if backward else {}

        def run() -> None:
            for weight in weights:
                torch.mm(inputs[weight.shape], weight.T, out=results[weight.shape])
            for weight in reversed(weights) if backward else ():
                torch.mm(results[weight.shape], weight, out=back[weight.shape])
                torch.mm(results[weight.shape].T, inputs[weight.shape], out=grads[weight.shape])

        return median_seconds(run, self.device)

    def _random(self, rows: int, columns: int) -> Tensor:
        return (0.05 * torch.randn(rows, columns, device=self.device)).to(self.dtype)

    @property
    def _like(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}


def _of_ppo(machine: Machine, size: Size, rows: dict[str, Any]) -> dict[str, float]:
    """Seconds by phase."""
    prompts = [len(row) for row in rows["prompts"]]
    count, answered = len(prompts), len(prompts) * size.new_tokens
    tokens = sum(prompts) + answered
    forward = machine.trunk(tokens)
    return {
        "rollout": machine.trunk(sum(prompts)) + machine.logits(count) + _decoding(machine, size, prompts),
        "reference": forward + machine.logits(answered),
        "reward": forward,
        "critic": forward,
        "update": size.minibatches
        * (
            2 * machine.trunk(tokens // size.minibatches, backward=True)
            + machine.logits(answered // size.minibatches, backward=True)
            + _step(machine, 2)
        ),
    }


def _decoding(machine: Machine, size: Size, prompts: list[int]) -> float:
    steps = size.new_tokens - 1
    if machine.device == "cpu":
        return steps * (machine.trunk(len(prompts)) + machine.logits(len(prompts)))
    width = machine.head.element_size()
    entry = 2 * size.layers * size.kv_heads * (size.hidden // size.heads) * width  # of a token, keys and values
    weights = machine.trunk_bytes + machine.head.nbytes
    return decoding_bytes(weights, entry, prompts, size.new_tokens) / machine.bytes_a_second


def decoding_bytes(weights: int, entry: int, prompts: Sequence[int], new_tokens: int) -> float:
    """What the steps after the prefill read: all ``weights`` in each, and the ``entry`` of every token before it."""
    steps = new_tokens - 1
    return float(steps * weights + entry * sum(steps * length + steps * (steps + 1) // 2 for length in prompts))


def _step(machine: Machine, models: int) -> float:
    return models * 7 * machine.parameters() * machine.trained.itemsize / machine.bytes_a_second


def _of_supervised(task: str, machine: Machine, rows: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of SFT, of a reward model or of DPO, by phase."""
    if task == "sft":
        answered = sum(len(response) for _, response in rows["demonstrations"])
        tokens = answered + sum(len(prompt) for prompt, _ in rows["demonstrations"])
    else:
        answered = sum(len(chosen) + len(rejected) for _, chosen, rejected in rows["pairs"])
        tokens = answered + sum(len(prompt) for prompt, *_ in rows["pairs"])  # once for both sides
    update = machine.trunk(tokens, backward=True) + _step(machine, 1)
    if task == "reward_model":
        return {"update": update}
    update += machine.logits(answered, backward=True)
    if task == "sft":
        return {"update": update}
    return {"reference": machine.trunk(tokens) + machine.logits(answered), "update": update}


def limits(task: str, size: Size, folder: Path, device: str, precision: str) -> dict[str, Any]:
    """Seconds by phase of the machine's limit, and the bandwidth of a copy in GB a second."""
    rows = work(folder)
    products = torch.float32 if precision == "float32" else torch.bfloat16
    machine = Machine(size, device, products, getattr(torch, PRECISIONS[precision]))
    seconds = _of_ppo(machine, size, rows) if task == "ppo" else _of_supervised(task, machine, rows)
    return {"seconds": seconds, "copy_gb_a_second": machine.bytes_a_second / 1e9}
