"""What does each operator take of a whole PPO, SFT or DPO step on this CPU, and what does the step gain by it?

    python benchmarks/profile_steps.py --task ppo --size 16m [--json benchmarks/results/profile_ppo_16m.json]

Trains the real module with Lightning's Trainer on random weights and tokens, each way in a process of its own:

- ``native``: the native operators, as installed;
- ``reference``: ``RLHF_LIGHTNING_OPS=reference``, their plain PyTorch references;
- ``plain``: those, and the LM head as people write it: all logits of the responses in float32, then ``cross_entropy``
  (SFT) or ``log_softmax`` and ``gather`` (DPO, PPO; PPO's entropy, which is only logged, without gradient).

Steps are timed bare, and in between the same number with a clock around each operator's forward and backward. All times
are wall times: the median of the steps after two to warm up, with the first and third quartile of the bare ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import provenance
import torch
from lightning.pytorch import Callback, Trainer
from steps.clock import Clock, operator, replace_everywhere
from steps.plain import plain_cross_entropy, plain_log_probs
from steps.report import WAYS, page, table
from steps.training import SIZES, RandomBatches, Size, make_module
from training.sizes import save_random

from rlhf_lightning.ops import extension

WARM_UP = 2


# One way, in a process of its own


class Steps(Callback):
    """Times the steps, every second one with the clock on."""

    def __init__(self, clock: Clock) -> None:
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
            seconds = getattr(module, "phase_seconds", {})
            self.phases.append({name: 1e3 * value for name, value in seconds.items()})


def work(task: str, size: Size, folder: Path, way: str, steps: int) -> dict[str, Any]:
    """The times of ``steps`` bare steps, and of the operators in as many others."""
    clock = Clock()
    plain = {"linear_token_log_probs": plain_log_probs(task == "ppo"), "linear_cross_entropy": plain_cross_entropy}
    for name in extension.OPERATORS:
        original = operator(name)
        chosen = plain.get(name, original) if way == "plain" else original
        replace_everywhere(original, clock.wrap(name, chosen))
    count = WARM_UP + 2 * steps
    timer = Steps(clock)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=size.precision,
        gradient_clip_val=None if task == "ppo" else 1.0,
        logger=False,
        callbacks=[timer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(make_module(task, size, folder, count), datamodule=RandomBatches(folder, task, size, count))
    return {
        "step_ms": timer.bare,
        "clocked_step_ms": timer.clocked,
        "peak_mib": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024],
        "phases": timer.phases,
        "operators": timer.operators,
    }


# All ways


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every way's times; the rounds go there and back, so that a machine that slows down slows all of them."""
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        save_random(SIZES[options.size], Path(folder))
        for number in range(options.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                rounds[way].append(run(options, way, Path(folder)))
    return {way: merged(parts) for way, parts in rounds.items()}


def run(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """What `work` measures, in a process of its own."""
    command = [sys.executable, __file__, "--task", options.task, "--size", options.size, "--way", way]
    command += ["--precision", options.precision, "--threads", str(options.threads), "--steps", str(options.steps)]
    path = folder / "measured.json"
    done = subprocess.run(
        [*command, "--model", str(folder), "--json", str(path)],
        env={**os.environ, extension.VARIABLE: "native" if way == "native" else "reference"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    measured: dict[str, Any] = json.loads(path.read_text())
    return measured


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds as one: the steps' times, and the medians of what they are made of."""
    together = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    names = sorted(together["operators"][0])
    return {
        "step_ms": together["step_ms"],
        "clocked_step_ms": together["clocked_step_ms"],
        "peak_mib": max(together["peak_mib"]),
        "phases_ms": medians(together["phases"]),
        "operators": {name: medians([step[name] for step in together["operators"]]) for name in names},
    }


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("ppo", "sft", "dpo"), required=True)
    parser.add_argument("--size", choices=SIZES, default="16m")
    parser.add_argument("--precision", help="of Lightning's Trainer; the size's own by default")
    parser.add_argument("--steps", type=int, default=4, help="bare steps of a process; as many with the clock on")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the numbers here, and a page beside it")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # a process of its own for one of them
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = SIZES[options.size]
    options.precision = options.precision or chosen.precision
    chosen = replace(chosen, precision=options.precision)
    if options.way:
        torch.set_num_threads(options.threads)
        measured = work(options.task, chosen, options.model, options.way, options.steps)
        options.json.write_text(json.dumps(measured))
        return
    size = {"name": options.size, **vars(chosen)}
    steps = options.rounds * options.steps
    facts = {**provenance.about("cpu", options.threads), "task": options.task, "size": size, "steps": steps}
    ways = measure(options)
    print("\n".join(table(ways)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": facts, "ways": ways}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(page(facts, ways, options.json))


if __name__ == "__main__":
    main()
