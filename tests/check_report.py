"""Check the demo's report.json: `python tests/check_report.py DIR`. Exit code 1 with the reason when it is not right.

Held are its schema, that every number is finite and in its range, and what docs/demo.md promises of every run: PPO's
win rate, its KL, and that it does not exploit the reward model. The bounds are those of `demo --quick`, the lower ones.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ALIGNED = {
    "gold_reward": (-math.inf, math.inf),
    "proxy_reward": (-math.inf, math.inf),
    "kl": (-1.0, 1000.0),  # nats; a mean of the k1 estimator may come out slightly negative near zero
    "win_rate_vs_sft": (0.0, 1.0),
}
LEAST_WIN_RATE = 0.65
MOST_KL = 15.0  # nats
SECTIONS = {
    "sft": {"perplexity": (1.0, math.inf), "gold_reward": (-math.inf, math.inf)},
    "reward_model": {"accuracy": (0.5, 1.0), "label_ceiling": (0.5, 1.0), "calibration_error": (0.0, 1.0)},
    "ppo": ALIGNED,
    "dpo": ALIGNED,
}


def problems(report: dict[str, Any]) -> list[str]:
    """What is wrong with a report, one line each; empty when it is right."""
    found = [f"no {key!r}" for key in ("seed", "warnings", "versions", "wall_seconds", *SECTIONS) if key not in report]
    if found:
        return found
    for section, ranges in SECTIONS.items():
        for key, (low, high) in ranges.items():
            found += _number(f"{section}.{key}", report[section].get(key), low, high)
    for stage, seconds in report["wall_seconds"].items():
        found += _number(f"wall_seconds.{stage}", seconds, 0.0, 24 * 3600.0)
    if not report["wall_seconds"]:
        found.append("wall_seconds names no stage")
    for section in ("ppo", "dpo"):
        interval = report[section].get("win_rate_ci")
        if not isinstance(interval, list) or len(interval) != 2:
            found.append(f"{section}.win_rate_ci is {interval!r}, expected [low, high]")
        elif not 0 <= interval[0] <= report[section]["win_rate_vs_sft"] <= interval[1] <= 1:
            found.append(f"{section}.win_rate_ci {interval} does not enclose the win rate")
    return found or _broken_promises(report)


def _broken_promises(report: dict[str, Any]) -> list[str]:
    ppo, found = report["ppo"], []
    if ppo["win_rate_vs_sft"] < LEAST_WIN_RATE:
        found.append(f"PPO does not beat SFT as it should: win rate {ppo['win_rate_vs_sft']:.3f} < {LEAST_WIN_RATE}")
    if ppo["kl"] > MOST_KL:
        found.append(f"PPO went too far: KL {ppo['kl']:.1f} > {MOST_KL} nats")
    return found + [f"the report warns: {line}" for line in report["warnings"] if line.startswith("PPO")]


def _number(name: str, value: Any, low: float, high: float) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return [f"{name} is {value!r}, expected a finite number"]
    return [] if low <= value <= high else [f"{name} is {value}, expected it between {low} and {high}"]


def main(folder: Path) -> int:
    """Check ``folder/report.json`` and that ``folder/report.html`` is self-contained."""
    for name in ("report.json", "report.html"):
        if not (folder / name).is_file():
            print(f"report: {folder / name} is missing", file=sys.stderr)
            return 1
    found = problems(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    html = (folder / "report.html").read_text(encoding="utf-8")
    found += [f"report.html loads something from outside: {mark}" for mark in ('src="http', "<link") if mark in html]
    for line in found:
        print(f"report: {line}", file=sys.stderr)
    if not found:
        print("report: complete, finite, and PPO beats SFT by as much as is promised")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
