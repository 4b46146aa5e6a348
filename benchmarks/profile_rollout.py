"""Where does the time of sampling responses go, and of the PPO step around it? Decides whether sampling needs a kernel.

    python benchmarks/profile_rollout.py [--size 16m|demo|smollm2] [--repeats 3] [--step] [--json FILE]

The rule: sampling gets a fused operator if it takes 5% or more of a PPO step, or of the rollouts that are all that
evaluating and annotating do. (The first half was set before the numbers; the second came after them, when a PPO step
without filters had shown 2%.) The models, batches and options are those of ``profile_steps.py``; the rollouts have no
end of sequence, so every row decodes all its tokens. Medians after one to warm up, sampling by the fused operator and
by its plain PyTorch reference in turn. ``--step`` times whole PPO steps too. Prints a table, and writes FILE and a page
beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import provenance
import torch
from lightning import Trainer
from steps.training import SIZES, EvenTokens, RandomBatches, Size
from training.sizes import save_random

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.models.head import Head
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.ops.sample_tokens import reference, sample_tokens
from rlhf_lightning.rollout import NativeEngine, Sampling, decoding
from rlhf_lightning.rollout.cache import SlotCache

FILTERS = {"no filter": {}, "top_k 50": {"top_k": 50}, "top_p 0.95": {"top_p": 0.95}}
KINDS = {"reference": reference, "fused": sample_tokens}
PARTS = ("trunk", "head", "sampling", "cache", "rest")


class Clock:
    """Seconds spent in wrapped functions, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - began

        setattr(owner, name, timed)


class Timed(PPOModule):
    """Keeps the seconds of each iteration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        began = time.perf_counter()
        super().training_step(batch, batch_idx)
        self.seconds.append(time.perf_counter() - began)


def rollout_times(policy: Policy, batches: RandomBatches, size: Size, clock: Clock, **filters: Any) -> dict[str, float]:
    """Median milliseconds of a rollout and of its parts."""
    rows, engine = [], NativeEngine()
    for iteration, batch in enumerate(batches.batches):
        clock.seconds.clear()
        began = time.perf_counter()
        sampling = Sampling(max_new_tokens=size.response[1], eos_ids=[], iteration=iteration, **filters)
        engine.rollout(policy, batch, batches.tokenizer, sampling)
        t = {"rollout": time.perf_counter() - began, **clock.seconds}
        t["trunk"] = t["decode"] - t["head"] - t["cache"]
        t["rest"] = t["rollout"] - t["decode"] - t["sampling"]
        rows.append(t)
    return {part: 1e3 * statistics.median(row[part] for row in rows[1:]) for part in ("rollout", *PARTS)}


def step_time(folder: Path, batches: RandomBatches, size: Size, **filters: Any) -> float:
    """Median milliseconds of a PPO step."""
    options = {"iterations": len(batches.batches), "max_new_tokens": size.response[1], **size.ppo, **filters}
    module = Timed(str(folder), EvenTokens(), **options)
    Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=size.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=batches)
    return 1e3 * statistics.median(module.seconds[1:])


def measure(size: Size, folder: Path, repeats: int, with_step: bool) -> list[dict[str, Any]]:
    """A row for each filter and each way to sample."""
    save_random(size, folder)
    policy, batches = Policy(load_causal_lm(folder)), RandomBatches(folder, "ppo", size, repeats + 1)
    clock = Clock()
    clock.wrap(Policy, "decode", "decode")
    clock.wrap(Head, "logits", "head")
    clock.wrap(SlotCache, "update", "cache")
    rows = []
    for label, filters in FILTERS.items():
        for kind, function in KINDS.items():
            decoding.sample_tokens = function
            clock.wrap(decoding, "sample_tokens", "sampling")
            row = {"filter": label, "sampling by": kind, **rollout_times(policy, batches, size, clock, **filters)}
            rows.append(row | ({"step": step_time(folder, batches, size, **filters)} if with_step else {}))
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, milliseconds; the last columns are the share that sampling has."""
    wholes = [name for name in ("rollout", "step") if name in rows[0]]
    head = ["filter", "sampling by", "rollout", *PARTS, *wholes[1:], *(f"sampling / {name}" for name in wholes)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in rows:
        times = [f"{row[name]:.1f}" for name in ("rollout", *PARTS, *wholes[1:])]
        shares = [f"{row['sampling'] / row[name]:.1%}" for name in wholes]
        lines.append([row["filter"], row["sampling by"], *times, *shares])
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="16m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--step", action="store_true", help="time whole PPO steps too")
    parser.add_argument("--json", type=Path, help="write the numbers here, and a page beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    about = {**provenance.about("cpu", options.threads), "size": {"name": options.size, **vars(size)}}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(size, Path(folder), options.repeats, options.step)
    print("\n".join(table(rows)))
    if options.json:
        what = f"{size.rows['ppo']} rows of {size.response[1]} new tokens, vocabulary {size.vocabulary}. Milliseconds: "
        what += f"the median of {options.repeats}, rollouts in float32, steps in {size.precision}."
        page = [f"# Sampling in a rollout: {options.size}", "", *provenance.header(about, options.json), what, ""]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text("\n".join([*page, *table(rows), ""]))


if __name__ == "__main__":
    main()
