"""What does each operator take of a whole PPO, SFT or DPO step on this CPU, and what does the step gain by it?

    python benchmarks/profile_steps.py --task ppo --size 16m [--json benchmarks/results/profile_ppo_16m.json]

Trains the real module with Lightning's Trainer on random weights and tokens, each way in a process of its own:

- ``native``: the native operators, as installed;
- ``reference``: ``RLHF_LIGHTNING_OPS=reference``, their plain PyTorch references;
- ``plain``: those, and the LM head as people write it: all logits of the responses in float32, then ``cross_entropy``
  (SFT) or ``log_softmax`` and ``gather`` (DPO, PPO; PPO's entropy, which is only logged, without gradient).

Steps are timed bare, and in between the same number with a clock around each operator's forward and backward. All times
are wall times: the median of the steps after two to warm up, with the first and third quartile of the bare ones.

``--top-k`` and ``--top-p`` give PPO's rollouts a filter. The rule by which sampling got an operator: it takes 5% or
more of a PPO step, as plain PyTorch writes it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import report
from harness.worker import once
from training.sizes import PROFILED, save_random

from rlhf_lightning.ops import extension

WAYS = ("native", "reference", "plain")
STEADY = 0.1  # by so much clocked and bare steps may differ


def measure(options: argparse.Namespace, ppo: dict[str, Any]) -> dict[str, Any]:
    """Every way's times; the rounds go there and back, so that a machine that slows down slows all of them."""
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        save_random(PROFILED[options.size][0], Path(folder))
        question = {name: getattr(options, name) for name in ("task", "size", "precision", "steps", "threads")}
        question |= {"ppo": ppo, "folder": folder}
        for number in range(options.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                ops = {extension.VARIABLE: "native" if way == "native" else "reference"}
                asked = {**question, "way": way}
                rounds[way].append(once("training.steps", asked, threads=options.threads, environment=ops))
    return {way: merged(parts) for way, parts in rounds.items()}


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


# The results for people


def spent(way: dict[str, Any], name: str) -> float:
    """Milliseconds of an operator in a clocked step."""
    taken = way["operators"].get(name, {"forward_ms": 0.0, "backward_ms": 0.0})
    return taken["forward_ms"] + taken["backward_ms"]


def steady(way: dict[str, Any]) -> bool:
    """Whether the steps with the clock on took what the bare ones took: else shares of a step say nothing."""
    bare, clocked = statistics.median(way["step_ms"]), statistics.median(way["clocked_step_ms"])
    return max(bare, clocked) <= (1 + STEADY) * min(bare, clocked)


def noise(times: list[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(times, method="inclusive")
    return (high - low) / 2 / middle


def gain(part: float, noise: float, *ways: dict[str, Any]) -> str:
    """A gain in words: nothing below 1%, or below what steps differ by themselves."""
    if not all(map(steady, ways)):
        return "unsteady"
    return "nothing" if abs(part) < max(0.01, noise) else f"{100 * part:+.0f}%"


def step_gain(was: dict[str, Any], native: dict[str, Any]) -> str:
    """By how much the native step is shorter: from bare steps alone."""
    part = 1 - statistics.median(native["step_ms"]) / statistics.median(was["step_ms"])
    return gain(part, max(noise(was["step_ms"]), noise(native["step_ms"])), was, native)


def saved(was: dict[str, Any], native: dict[str, Any], name: str) -> str:
    """What the native operator saves of a step: from clocked steps alone."""
    part = (spent(was, name) - spent(native, name)) / statistics.median(was["clocked_step_ms"])
    return gain(part, noise(was["clocked_step_ms"]), was, native)


def table(ways: dict[str, Any]) -> list[str]:
    """Markdown: the steps, and the operators in them."""
    native, *others = (ways[way] for way in WAYS)
    steps = [statistics.quantiles(ways[way]["step_ms"], method="inclusive") for way in WAYS]
    clocked = [statistics.median(ways[way]["clocked_step_ms"]) for way in WAYS]
    marks = ["" if steady(ways[way]) else " (unsteady)" for way in WAYS]
    rows = [
        ["", *WAYS],
        ["step, ms", *(f"{middle:.0f} ({low:.0f} to {high:.0f})" for low, middle, high in steps)],
        ["clocked step, ms", *(f"{ms:.0f}{mark}" for ms, mark in zip(clocked, marks, strict=True))],
        ["times native", *(f"{middle / steps[0][1]:.2f}" for _, middle, _ in steps)],
        ["the native step gained", "", *(step_gain(was, native) for was in others)],
    ]
    for phase in native["phases_ms"]:
        rows.append([f"{phase}, ms", *(f"{ways[way]['phases_ms'][phase]:.0f}" for way in WAYS)])
    rows.append(["peak, MiB", *(f"{ways[way]['peak_mib']:.0f}" for way in WAYS)])
    parts = [["operator", "calls", *(f"{way}, ms" for way in WAYS), *(f"saved over {way}" for way in WAYS[1:])]]
    for name, taken in native["operators"].items():
        times = []
        for way, whole in zip(WAYS, clocked, strict=True):
            ms = spent(ways[way], name)
            times.append(f"{ms:.2f} ({f'{100 * ms / whole:.1f}%' if steady(ways[way]) else 'unsteady'})")
        parts.append([name, f"{taken['calls']:.0f}", *times, *(saved(was, native, name) for was in others)])
    wholes = zip(WAYS, clocked, strict=True)
    rest = [ms - sum(spent(ways[way], name) for name in native["operators"]) for way, ms in wholes]
    parts.append(["all else", "", *(f"{ms:.0f}" for ms in rest), *[""] * len(others)])
    return [*report.markdown(rows), "", *report.markdown(parts)]


def write(facts: dict[str, Any], ways: dict[str, Any], path: Path) -> None:
    """The JSON at ``path``, and beside it a page with the tables and what they need to be understood."""
    size, task = facts["size"], facts["task"]
    responses = f"{size['response'][1]}" if task == "ppo" else f"{size['response'][0]} to {size['response'][1]}"
    what = (
        f"A Llama of random weights, {size['layers']} layers of width {size['hidden']}, vocabulary "
        f"{size['vocabulary']}, {size['precision']}; {size['rows'][task]} {'pairs' if task == 'dpo' else 'rows'} a "
        f"step, prompts of {size['prompt'][0]} to {size['prompt'][1]} tokens, responses of {responses}. Milliseconds: "
        f"the median of {facts['steps']} bare steps and, in brackets, their quartiles. {NOTES}"
    )
    title = f"The operators in a whole {task.upper()} step: {size['name']}"
    report.write({"about": facts, "ways": ways}, path, title, what, table(ways))


NOTES = f"""\
As many others are clocked: an operator's forward and backward together, and its share of the median clocked step.
`native`: as installed; `reference`: the operators in plain PyTorch; `plain`: those, and the head as people write
it, with all logits of the responses held. What the native step gained is from bare steps alone; what an operator
saved of the step, in the last columns, from clocked ones alone; what is less than 1%, or less than steps differ by
themselves, is nothing. Where bare and clocked steps of a way differ by more than {STEADY:.0%}, the run was unsteady
and no share is told. `peak` is the process's largest resident memory, PyTorch and model included."""


def main() -> None:
    parser = report.parser(__doc__, device=False)
    parser.add_argument("--task", choices=("ppo", "sft", "dpo"), required=True)
    parser.add_argument("--size", choices=PROFILED, default="16m")
    parser.add_argument("--precision", help="of Lightning's Trainer; the size's own by default")
    parser.add_argument("--steps", type=int, default=4, help="bare steps of a process; as many with the clock on")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--top-k", type=int, help="of PPO's rollouts (default: no filter)")
    parser.add_argument("--top-p", type=float)
    options = parser.parse_args()
    if options.rounds * options.steps < 2:
        parser.error("--rounds, --steps: quartiles need two bare steps of each way at least")
    size, precision, ppo = PROFILED[options.size]
    options.precision = options.precision or precision
    filters = {name: value for name in ("top_k", "top_p") if (value := getattr(options, name)) is not None}
    ppo = {**ppo, "minibatches": size.minibatches, **filters}
    shape = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary")
    told = {"name": options.size, **{name: getattr(size, name) for name in shape}, "precision": options.precision}
    told |= {"prompt": size.prompt, "response": size.response, "ppo": ppo}
    told |= {"rows": {"ppo": size.prompts, "sft": size.rows, "dpo": size.rows}}
    steps = options.rounds * options.steps
    facts = {**report.about("cpu", options.threads), "task": options.task, "size": told, "steps": steps}
    ways = measure(options, ppo)
    print("\n".join(table(ways)))
    if options.json:
        write(facts, ways, options.json)


if __name__ == "__main__":
    main()
