"""Who takes part in which task of `bench_training.py`, and the process of a side, which trains a few steps."""

from __future__ import annotations

import importlib
import importlib.metadata
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness.clock import Meter
from harness.memory import MIB
from harness.worker import Answer, Serve, once
from torch import Tensor

from training.sizes import Size, fill, size_of

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


ALL = ("ppo", "sft", "reward_model", "dpo")
ENTRANTS = {
    OURS: Entrant("ours", ALL, packages=("lightning",), compiled={"compile_layers": True}),
    TRL_PPO: Entrant("trl_sides", ("ppo",), "trl_ppo", ("trl", "accelerate")),
    PLAIN: Entrant("plain_ppo", ("ppo",)),
    TRL: Entrant(
        "trl_sides", ("sft", "reward_model", "dpo"), "trl", ("trl", "accelerate"), compiled={"torch_compile": True}
    ),
}


def measure(name: str, work: dict[str, Any], folder: Path, steps: tuple[int, int, int]) -> Answer:
    """One process of a side, or the limits; raises Refused.

    ``work``: task, size, device, precision, threads, compile and seed; ``steps``: see `Meter`.
    """
    question = {"do": name, **work, "steps": steps, "folder": str(folder)}
    place = None if name == LIMITS else ENTRANTS[name].folder
    start = {"threads": work["threads"], "folder": place, "ours": name == OURS, "limit": TIME_LIMIT}
    return once("training.sides", question, **start)


def measure_point(changed: dict[str, int], device: str, threads: int, folder: str) -> Answer:
    """One point of `training_growth.py`: the median seconds of our step, and its activations; raises Refused."""
    question = {"do": "point", "changed": changed, "device": device, "threads": threads, "folder": folder}
    return once("training.sides", question, threads=threads)


# The process


def serve() -> Serve:
    """For `harness.worker`."""
    from transformers.models.llama import modeling_llama  # noqa: F401, so that it counts among the libraries

    return {}, answer


def answer(do: str, threads: int, folder: str, device: str, **question: Any) -> Answer:
    """What `measure` and `measure_point` ask."""
    torch.set_num_threads(threads)
    if do == "point":
        return _point(device, Path(folder), **question)
    return _train(do, device, Path(folder), **question)


def _train(
    name: str,
    device: str,
    folder: Path,
    task: str,
    size: str,
    precision: str,
    compile: bool,
    steps: tuple[int, int, int],
    seed: int = 0,
) -> Answer:
    if name == LIMITS:
        from training import limits

        return limits.of(task, size_of(size, device), folder, device, precision)
    torch.manual_seed(seed)
    entrant = ENTRANTS[name]
    side = importlib.import_module(f"training.{entrant.module}")
    names = (*entrant.packages, "torch", "transformers")
    versions = {package: importlib.metadata.version(package) for package in names}
    meter = Meter(device, *steps, rest="other" if task == "ppo" else "update")
    options = entrant.compiled if compile else {}
    measured = side.run(task, size_of(size, device), folder, device, precision, meter, seed, **options)
    return {**measured, "versions": versions}


class Counting(Meter):
    """Also counts, in the steps taken apart, the bytes that the update's passes keep for their backwards."""

    saved_bytes = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            if name != "update" or self.steps < self.warm_up + self.timed:
                yield
                return
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                whole = tensor if tensor._base is None else tensor._base
                if not (whole.is_leaf and whole.requires_grad):  # a parameter, or a view of one
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            self.saved_bytes = sum(kept.values())


def _point(device: str, folder: Path, changed: dict[str, int]) -> Answer:
    from training import ours

    base = {"hidden": 128, "intermediate": 352, "layers": 2, "heads": 2, "kv_heads": 2, "minibatches": 1}
    size = Size(**base, **changed)
    fill(size, folder)
    meter = Counting(device, warm_up=2, timed=5, apart=1)
    measured = ours.run("ppo", size, folder, device, "float32", meter, seed=0)
    return {"seconds": statistics.median(measured["seconds"]), "activations_mb": meter.saved_bytes / MIB}
