"""Every side in a process of its own, round after round, and what the rounds together say."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from installed import INSTALLED

from training.entrants import ENTRANTS, OURS

BENCHMARKS = Path(__file__).resolve().parent.parent
TIME_LIMIT = 1800.0  # seconds of one process
COUNTS = ("new_tokens", "tokens", "optimizer_steps")  # of a step: the same on every side


class Failed(Exception):
    """A process that ended with an error; the message is its last line."""


def measure(name: str, work: dict[str, Any], folder: Path, steps: tuple[int, int, int]) -> dict[str, Any]:
    """One process of a side; ``work``: task, size, device, precision, threads, seed; ``steps``: see `Meter`."""
    entrant = ENTRANTS[name]
    peer = [INSTALLED / entrant.folder] if entrant.folder else []
    arguments = [name, *(work[key] for key in ("task", "size", "device", "precision", "threads", "seed")), *steps]
    arguments.append("compiled" if work["compile"] else "eager")
    return _process("training.worker", arguments, folder, peer, "native" if name == OURS else None)


def limits(work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The least seconds of our step, by phase."""
    arguments = [work[key] for key in ("task", "size", "device", "precision", "threads")]
    return _process("training.limits", arguments, folder, [], None)


def _process(module: str, arguments: list[Any], folder: Path, first: list[Path], ops: str | None) -> dict[str, Any]:
    path = os.pathsep.join([*map(str, (*first, BENCHMARKS, BENCHMARKS.parent)), *_given_path()])
    variables = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["OMP_NUM_THREADS"] = str(arguments[4])
    if ops is not None:
        variables["RLHF_LIGHTNING_OPS"] = ops  # a reference must not pass for the operator
    with tempfile.TemporaryDirectory() as out:
        target = Path(out) / "measured.json"
        command = [sys.executable, "-m", module, *map(str, arguments), str(folder), str(target)]
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done within {TIME_LIMIT:.0f} s") from None
        if done.returncode != 0:
            raise Failed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        measured: dict[str, Any] = json.loads(target.read_text())
    return measured


def _given_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def summary(results: dict[str, Any]) -> None:
    """Fills in all that follows from ``runs``: medians, ratios, the work, the quality and the breakdown."""
    runs = {name: found for name, found in results["runs"].items() if found}
    rows = {name: _row(found) for name, found in runs.items()}
    results["ours"] = rows.get(OURS)
    results["peers"] = {name: row for name, row in rows.items() if name != OURS}
    results["ratio"] = {name: _ratio(row, rows[OURS]) for name, row in results["peers"].items() if OURS in rows}
    results["work"] = {name: _work(found) for name, found in runs.items()}
    results["same_work"] = len({json.dumps(done, sort_keys=True) for done in results["work"].values()}) <= 1
    results["quality"] = {name: _quality(found) for name, found in runs.items()}
    results["memory"] = {name: _memory(found) for name, found in runs.items()}
    steps = {name: memory["step"] for name, memory in results["memory"].items()}
    results["step_memory_ratio"] = {
        name: step / steps[OURS] for name, step in steps.items() if name != OURS and OURS in steps
    }
    results["breakdown"] = {name: _breakdown(found) for name, found in runs.items()}


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


def _memory(runs: list[dict[str, Any]]) -> dict[str, float]:
    libraries = statistics.median(run["libraries_mb"] for run in runs)
    peak = statistics.median(run["peak_mb"] for run in runs)
    reserved = statistics.median(run.get("reserved_mb", 0.0) for run in runs)
    return {**runs[0]["state_mb"], "libraries": libraries, "step": peak - libraries, "reserved": reserved}


def _breakdown(runs: list[dict[str, Any]]) -> dict[str, float]:
    steps = [step for run in runs for step in run["phases"]]
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in (steps[0] if steps else ())}
