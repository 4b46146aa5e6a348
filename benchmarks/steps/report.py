"""The steps and the operators in them, for people: a table, and a page around it."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

import provenance

WAYS = ("native", "reference", "plain")


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


def page(facts: dict[str, Any], ways: dict[str, Any], path: Path) -> str:
    """The table in Markdown, with what it needs to be understood."""
    size, task = facts["size"], facts["task"]
    responses = f"{size['response'][1]}" if task == "ppo" else f"{size['response'][0]} to {size['response'][1]}"
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
    return "\n".join([title, "", *provenance.header(facts, path), textwrap.fill(what, 120), "", *table(ways), ""])
