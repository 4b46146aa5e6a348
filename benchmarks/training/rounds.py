"""What the rounds of `bench_training.py` together say, and its results for people: the tables, the page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from harness import report
from harness.report import markdown, number

from training.entrants import OURS, PLAIN
from training.sizes import Size, size_of

COUNTS = ("new_tokens", "tokens", "optimizer_steps")  # of a step: the same on every side

GOALS = {"ppo": {"cpu": (3.0, 3.0), "cuda": (5.0, None)}}
SUPERVISED_GOAL = (1.5, 1.0)


def summary(results: dict[str, Any]) -> None:
    """Fills in all that follows from ``runs``: medians, ratios, the work, the quality and the breakdown."""
    runs = results["runs"]
    rows = {name: _row(found) for name, found in runs.items()}
    memory = {name: _held(found) for name, found in runs.items()}
    ours, peers = rows.get(OURS), {name: row for name, row in rows.items() if name != OURS}
    results["ours"], results["peers"] = ours, peers
    results["ratio"] = {name: _ratio(row, ours) for name, row in peers.items() if ours}
    results["work"] = {name: _work(found) for name, found in runs.items()}
    results["same_work"] = len({json.dumps(done, sort_keys=True) for done in results["work"].values()}) <= 1
    results["quality"] = {name: _quality(found) for name, found in runs.items()}
    results["memory"] = memory
    results["step_memory_ratio"] = {name: memory[name]["step"] / memory[OURS]["step"] for name in peers if ours}
    results["breakdown"] = {name: _phases(found) for name, found in runs.items()}


def _row(runs: list[dict[str, Any]]) -> dict[str, float]:
    seconds = statistics.median(second for run in runs for second in run["seconds"])
    return {"seconds": seconds, "peak_mb": statistics.median(run["peak_mb"] for run in runs)}


def _ratio(peer: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    return {"time": peer["seconds"] / ours["seconds"], "memory": peer["peak_mb"] / ours["peak_mb"]}


def _work(runs: list[dict[str, Any]]) -> dict[str, float]:
    """What each step did; a list where steps differ, which no two sides will then have in common."""
    steps = [step for run in runs for step in run["work"]]
    counts = {name: sorted({step[name] for step in steps if name in step}) for name in COUNTS}
    return {name: found[0] if len(found) == 1 else found for name, found in counts.items() if found}


def _quality(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Score and KL (or the loss) over the first and the last quarter of the steps."""
    names = [name for name in runs[0]["work"][0] if name not in COUNTS]
    quality = {}
    for name in names:
        values = [[step[name] for step in run["work"]] for run in runs]
        quarter = max(1, len(values[0]) // 4)
        quality[f"{name}, first"] = statistics.fmean(value for run in values for value in run[:quarter])
        quality[f"{name}, last"] = statistics.fmean(value for run in values for value in run[-quarter:])
    return quality


def _held(runs: list[dict[str, Any]]) -> dict[str, float]:
    libraries = statistics.median(run["libraries_mb"] for run in runs)
    peak = statistics.median(run["peak_mb"] for run in runs)
    reserved = statistics.median(run.get("reserved_mb", 0.0) for run in runs)
    return {**runs[0]["state_mb"], "libraries": libraries, "step": peak - libraries, "reserved": reserved}


def _phases(runs: list[dict[str, Any]]) -> dict[str, float]:
    steps = [step for run in runs for step in run["phases"]]
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in (steps[0] if steps else ())}


def table(results: dict[str, Any]) -> list[list[str]]:
    """The rows for both, the header first."""
    rows = [["", "seconds a step", "times ours", "peak, MB", "times ours", "of it libraries", "first and last"]]
    sides = {OURS: results["ours"], **results["peers"]}
    for name, row in sides.items():
        if row is None:
            continue
        ratio = results["ratio"].get(name)
        times = [f"{ratio['time']:.2f}", f"{ratio['memory']:.2f}"] if ratio else ["", ""]
        memory, quality = results["memory"][name], results["quality"][name]
        learned = {key.partition(",")[0] for key in quality}
        shown = "; ".join(
            f"{key} {quality[key + ', first']:.3f}, {quality[key + ', last']:.3f}" for key in sorted(learned)
        )
        libraries = number(memory["libraries"]) if memory["libraries"] else ""
        rows.append([name, number(row["seconds"]), times[0], number(row["peak_mb"]), times[1], libraries, shown])
    return rows


def verdicts(results: dict[str, Any]) -> list[str]:
    """The goals, met or missed."""
    task, device = results["task"], results["device"]
    if results["size"] == "tiny":
        return ["tiny: these times mean nothing"]
    time_goal, memory_goal = GOALS[task][device] if task in GOALS else SUPERVISED_GOAL
    said = []
    for name, ratio in results["ratio"].items():
        if name == PLAIN:
            continue
        ratio = {**ratio, "memory without the libraries": results["step_memory_ratio"][name]}
        goals = {"time": time_goal, "memory": memory_goal}
        if device == "cpu":
            goals["memory without the libraries"] = memory_goal
        for what, goal in goals.items():
            if goal is not None:
                met = "met" if ratio[what] >= goal else "missed"
                said.append(f"{name}, {what}: {ratio[what]:.2f} times ours, goal {goal:g}: {met}")
    return said


def breakdown(results: dict[str, Any]) -> list[list[str]]:
    """Seconds of the phases, every side's, and beside ours the limit."""
    parts, floor = results["breakdown"], results["limits"].get("seconds", {})
    sides = sorted((name for name in parts if parts[name]), key=lambda name: name != OURS)
    phases = list(dict.fromkeys(phase for name in sides for phase in parts[name]))
    phases.sort(key=lambda phase: phase == "other")
    rows = [["seconds", *sides, "limit", "ours / limit"]]
    for phase in phases:
        ours, least = parts.get(OURS, {}).get(phase), floor.get(phase)
        cells = [number(parts[name].get(phase)) for name in sides]
        rows.append([phase, *cells, number(least), f"{ours / least:.2f}" if ours and least else ""])
    return rows


def write(results: dict[str, Any], path: Path) -> None:
    """The JSON at ``path``, the page beside it."""
    size = size_of(results["size"], results["device"])
    versions = {f"{name} {version}" for found in results["versions"].values() for name, version in found.items()}
    report.write(
        results,
        path,
        f"{TITLES[results['task']]}, {results['size']}, {'a CPU' if results['device'] == 'cpu' else 'a GPU'}",
        f"{', '.join(sorted(versions))}.",
        _what(results, size),
        markdown(table(results)),
        [f"- {verdict}" for verdict in verdicts(results)],
        NOTES,
        [f"Not there: {name} ({reason})." for name, reason in results["missing"].items()],
        "" if results["same_work"] else f"**Not the same work: {results['work']}**",
        "## Where the time goes",
        markdown(breakdown(results)),
        LIMITS,
        "## Memory",
        markdown(_memory(results)),
        MEMORY,
    )


def _memory(results: dict[str, Any]) -> list[list[str]]:
    kinds = ["models", "gradients", "optimizer", "libraries", "step"]
    kinds += ["reserved"] if results["device"] != "cpu" else []
    rows = [["MB", *kinds, "step, times ours"]]
    for name in sorted(results["memory"], key=lambda name: name != OURS):
        held, ratio = results["memory"][name], results["step_memory_ratio"].get(name)
        rows.append([name, *(number(held[kind]) for kind in kinds), f"{ratio:.2f}" if ratio else ""])
    return rows


def _what(results: dict[str, Any], size: Size) -> str:
    """The work in words."""
    done = next(iter(results["work"].values()), {})
    weights = "random weights" if size.folder is None else "its own weights"
    mixed, ppo = results["precision"] == "bf16-mixed", results["task"] == "ppo"
    dtype = "float32 under autocast to bfloat16" if mixed else results["precision"]
    said = f"A Llama of {size.layers} layers of width {size.hidden}, vocabulary {size.vocabulary}, {weights}, {dtype}. "
    if ppo and mixed:
        said += "Of TRL's passes those of the update alone are under it. "
    prompts = f"prompts of {size.prompt[0]} to {size.prompt[1]} tokens"
    if ppo:
        said += (
            f"{size.prompts} {prompts}, {size.new_tokens} new tokens to each (no response ends before), "
            f"{size.minibatches} minibatches, 1 epoch; policy, critic, reference and reward model of the same size, "
            "the old log-probs those of the rollout. "
        )
    else:
        what = "rows" if results["task"] == "sft" else "pairs"
        said += (
            f"{size.rows} {what} a step, {prompts}, responses of {size.response[0]} to {size.response[1]}, the same "
            "rows in every step. "
        )
    if ppo and size.micro_rows:
        said += f"Peers pass {size.micro_rows} rows of a minibatch at a time, ours by its default. "
    return f"{said}Each step of every side: {done}."


MEMORY = """\
"Step" is the peak without the libraries: what the work itself takes. Weights, gradients and moments are the same on
every side. "Reserved", on a GPU, is the most that the allocator held, all these included: what a CUDA graph writes as
it replays is in it and not in the peak, and so is memory that was kept for later use."""
TITLES = {
    "ppo": "A PPO iteration",
    "sft": "A step of SFT",
    "reward_model": "A step of a reward model",
    "dpo": "A step of DPO",
}
NOTES = """\
Seconds: the median of the timed steps of all processes of a side, each after a warm-up; one side at a time, in turns.
Peak: the largest resident set (on a GPU the most allocated) in those steps, less parameters and buffers of the models,
gradients of what is trained, and optimizer state, all counted from the tensors' shapes. On a CPU it has the interpreter
and the libraries in it, which are given beside it: what was resident before a model was there. First and last: means
over the first and the last quarter of the steps of a process; in PPO of each side's own samples, which so few steps
hardly move: `demo_against_trl.py` compares rewards in earnest."""
LIMITS = """\
Medians of steps that are timed by phase, apart from those above. The limit: the bare matrix products of the phase, on
no padding and a pair's prompt once, and the optimizer's bytes at the bandwidth of a copy, measured in the same run;
attention's own products, norms and activations are not in it. "Update" lasts from the first pass with gradients to the
end of the step."""
