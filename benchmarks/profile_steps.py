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
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, PromptBatch, Rollout
from rlhf_lightning.modules import DPOModule, PPOModule, SFTModule
from rlhf_lightning.ops import extension
from rlhf_lightning.rewards import Reward

WAYS = ("native", "reference", "plain")
WARM_UP = 2


@dataclass(frozen=True)
class Size:
    """A model, and the batches that it is trained on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    precision: str
    prompt: tuple[int, int]  # tokens, from and to
    response: tuple[int, int]  # the same; PPO samples as many as its longest
    rows: dict[str, int]  # of a batch, by task
    ppo: dict[str, Any]  # options


SIZES = {
    "16m": Size(
        **{"hidden": 256, "intermediate": 688, "layers": 4, "heads": 4, "kv_heads": 4, "vocabulary": 49152},
        **{"precision": "32-true", "prompt": (8, 32), "response": (16, 48)},
        rows={"ppo": 16, "sft": 16, "dpo": 16},
        ppo={"epochs": 1, "minibatches": 4},
    ),
    # The model, batches and lengths of the demo (configs/demo/).
    "demo": Size(
        **{"hidden": 192, "intermediate": 512, "layers": 2, "heads": 4, "kv_heads": 4, "vocabulary": 768},
        **{"precision": "32-true", "prompt": (17, 21), "response": (20, 48)},
        rows={"ppo": 128, "sft": 32, "dpo": 32},
        ppo={"epochs": 2, "minibatches": 2},
    ),
    # SmolLM2-135M's shape, as configs/smollm2/ train it.
    "smollm2": Size(
        **{"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocabulary": 49152},
        **{"precision": "bf16-mixed", "prompt": (40, 80), "response": (16, 48)},
        rows={"ppo": 8, "sft": 16, "dpo": 16},
        ppo={"epochs": 1, "minibatches": 2, "critic": 4, "micro_batch_tokens": 2048},
    ),
}


# What is trained


def save_model(size: Size, folder: Path) -> None:
    """A Llama of random weights, embeddings tied, and a tokenizer of as many words."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size.vocabulary)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)


class EvenTokens(Reward):
    """The share of tokens with an even id: costs nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return (rollout.tokens % 2 == 0).float().mean(dim=1)


class RandomBatches(LightningDataModule):
    """``count`` batches of random tokens and lengths, fresh in every step."""

    def __init__(self, folder: Path, task: str, size: Size, count: int) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.task, self.size = task, size
        self.draw = torch.Generator().manual_seed(1)
        self.batches = [self._batch(number) for number in range(count)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def _lengths(self, bounds: tuple[int, int]) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, (self.size.rows[self.task],), generator=self.draw)

    def _tokens(self, lengths: Tensor) -> Tensor:
        shape = (len(lengths), int(lengths.max()))
        return torch.randint(4, self.size.vocabulary, shape, generator=self.draw)

    def _batch(self, number: int) -> Any:
        prompts, rows = self._lengths(self.size.prompt), self.size.rows[self.task]
        weights = torch.ones(rows)
        if self.task == "ppo":
            numbers = number * rows + torch.arange(rows)
            return PromptBatch(self._tokens(prompts), prompts, numbers, weights, [""] * rows, {})
        sides = []
        for _ in range(1 if self.task == "sft" else 2):
            lengths = prompts + self._lengths(self.size.response)
            sides.append(DemonstrationBatch(self._tokens(lengths), lengths, prompts, weights))
        return sides[0] if self.task == "sft" else PreferenceBatch(*sides, torch.zeros(rows), weights)


def make_module(task: str, size: Size, folder: Path, steps: int) -> Any:
    if task == "sft":
        return SFTModule(str(folder))
    if task == "dpo":
        return DPOModule(str(folder))
    return PPOModule(str(folder), EvenTokens(), iterations=steps, max_new_tokens=size.response[1], **size.ppo)


# The clock


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


# All ways, and what they say


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every way's times; the rounds go there and back, so that a machine that slows down slows all of them."""
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(SIZES[options.size], Path(folder))
        for number in range(options.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                rounds[way].append(run(options, way, Path(folder)))
    return {way: merged(parts) for way, parts in rounds.items()}


def run(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """What `work` measures, in a process of its own."""
    command = [sys.executable, __file__, "--task", options.task, "--size", options.size, "--way", way]
    command += ["--threads", str(options.threads), "--steps", str(options.steps)]
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


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def spent(way: dict[str, Any], name: str) -> float:
    taken = way["operators"].get(name, {"forward_ms": 0.0, "backward_ms": 0.0})
    return taken["forward_ms"] + taken["backward_ms"]


def verdict(ways: dict[str, Any], before: str, name: str) -> str:
    """What the step gained by this operator alone, unless steps differ as much by themselves."""
    low, step, high = quartiles(ways[before]["step_ms"])
    gain = (spent(ways[before], name) - spent(ways["native"], name)) / step
    if abs(gain) < max(0.01, (high - low) / 2 / step):
        return "nothing"
    return f"{100 * gain:+.0f}%"


def table(ways: dict[str, Any]) -> list[str]:
    """Markdown: the steps, and the operators in them."""
    steps = {way: quartiles(ways[way]["step_ms"]) for way in WAYS}
    native = steps["native"][1]
    rows = [
        ["", *WAYS],
        ["---", *["---:"] * len(WAYS)],
        ["step, ms", *(f"{middle:.0f} ({low:.0f} to {high:.0f})" for low, middle, high in steps.values())],
        ["times native", *(f"{middle / native:.2f}" for _, middle, _ in steps.values())],
    ]
    for phase in ways["native"]["phases_ms"]:
        rows.append([f"{phase}, ms", *(f"{ways[way]['phases_ms'][phase]:.0f}" for way in WAYS)])
    rows.append(["peak, MiB", *(f"{ways[way]['peak_mib']:.0f}" for way in WAYS)])
    rows += [[], ["operator", "calls", *(f"{way}, ms" for way in WAYS), *(f"gain over {way}" for way in WAYS[1:])]]
    rows.append(["---", *["---:"] * (len(rows[-1]) - 1)])
    for name, taken in ways["native"]["operators"].items():
        times = [f"{spent(ways[way], name):.2f} ({100 * spent(ways[way], name) / steps[way][1]:.1f}%)" for way in WAYS]
        gains = [verdict(ways, before, name) for before in WAYS[1:]]
        rows.append([name, f"{taken['calls']:.0f}", *times, *gains])
    rest = [steps[way][1] - sum(spent(ways[way], name) for name in ways[way]["operators"]) for way in WAYS]
    rows.append(["all else", "", *(f"{ms:.0f}" for ms in rest), *[""] * len(WAYS[1:])])
    return ["| " + " | ".join(cells) + " |" if cells else "" for cells in rows]


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, commit, command and date."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True).stdout

    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/profile_steps.py", *sys.argv[1:]]),
        "commit": git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else ""),
        "cpu": f"{(names or [platform.machine()])[0].strip()}, {os.cpu_count()} cores",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "task": options.task,
        "size": {"name": options.size, **vars(SIZES[options.size])},
        "steps": options.rounds * options.steps,
    }


def page(facts: dict[str, Any], ways: dict[str, Any], path: Path) -> str:
    size, task = facts["size"], facts["task"]
    responses = f"{size['response'][1]}" if task == "ppo" else f"{size['response'][0]} to {size['response'][1]}"
    made = (
        f"{facts['cpu']} ({facts['capability']}), {facts['threads']} threads. torch {facts['torch']}, Python "
        f"{facts['python']}, commit {facts['commit']}, {facts['date']}. All numbers: `{path.name}`. Made by"
    )
    what = (
        f"A Llama of random weights, {size['layers']} layers of width {size['hidden']}, vocabulary "
        f"{size['vocabulary']}, {size['precision']}; {size['rows'][task]} {'pairs' if task == 'dpo' else 'rows'} a "
        f"step, prompts of {size['prompt'][0]} to {size['prompt'][1]} tokens, responses of {responses}. Milliseconds: "
        f"the median of {facts['steps']} steps and, in brackets, their quartiles; an operator's forward and backward "
        "together, in as many other steps, and its share of the median step. `native`: as installed; `reference`: the "
        "operators in plain PyTorch; `plain`: those, and the head as people write it, with all logits of the responses "
        "held. The last columns say what the native operator gains the step; what is less than 1%, or less than "
        "steps differ by themselves, is nothing. `peak` is the process's largest resident memory, PyTorch and model "
        "included."
    )
    title = f"# The operators in a whole {task.upper()} step: {size['name']}"
    wrapped = [textwrap.fill(made, 120), "", f"    {facts['command']}", "", textwrap.fill(what, 120)]
    return "\n".join([title, "", *wrapped, "", *table(ways), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("ppo", "sft", "dpo"), required=True)
    parser.add_argument("--size", choices=SIZES, default="16m")
    parser.add_argument("--steps", type=int, default=4, help="bare steps of a process; as many with the clock on")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the numbers here, and a page beside it")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # a process of its own for one of them
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        torch.set_num_threads(options.threads)
        measured = work(options.task, SIZES[options.size], options.model, options.way, options.steps)
        options.json.write_text(json.dumps(measured))
        return
    facts, ways = about(options), measure(options)
    print("\n".join(table(ways)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": facts, "ways": ways}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(page(facts, ways, options.json))


if __name__ == "__main__":
    main()
