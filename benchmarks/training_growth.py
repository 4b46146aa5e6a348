"""How do the time and the memory of our PPO step grow with prompts, vocabulary and response length?

    python benchmarks/training_growth.py [--axis prompts vocabulary new_tokens] [--device cpu|cuda] [--json FILE]

One size is changed at a time, each point in a process of its own; the step's update is one minibatch. Activations are
counted, not sampled: the bytes of all tensors that the passes of the update keep for their backwards (parameters aside,
shared storage once). Writes FILE, and beside it a page (.md) and a plot (.png); axes that are already in FILE and are
not measured now stay. The exponent of a line is its slope in the logarithms from the second-largest point to the
largest: 1 is linear.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import report
from harness.report import number
from harness.worker import Refused
from training.sides import measure_point

BASE = {"prompts": 16, "vocabulary": 8192, "new_tokens": 48}
AXES = {
    "prompts": (8, 16, 32, 64),
    "vocabulary": (4096, 16384, 32768, 65536),
    "new_tokens": (24, 48, 96, 192),
}
LINES = {"seconds": "seconds a step", "activations_mb": "activations of the update, MB"}


def exponent(points: list[dict[str, Any]], axis: str, line: str) -> float:
    """The slope between the two largest points, in logarithms."""
    first, second = points[-2:]
    return math.log(second[line] / first[line]) / math.log(second[axis] / first[axis])


def page(results: dict[str, Any], path: Path, picture: Path | None) -> list[str]:
    """The facts of the JSON in Markdown."""
    text = ["# How a PPO step of ours grows", "", *report.header(results["about"], path)]
    text += [
        f"A Llama of 2 layers of width 128, float32, prompts of 8 to 32 tokens; where nothing else is said "
        f"{BASE['prompts']} prompts, vocabulary {BASE['vocabulary']} and {BASE['new_tokens']} new tokens. Policy, "
        "critic, reference and reward model; one minibatch. Attention is in the time of longer responses.",
        "",
    ]
    for axis, points in results["axes"].items():
        rows = [[axis, *LINES.values()]]
        rows += [[f"{point[axis]}", *(number(point[line]) for line in LINES)] for point in points]
        rows.append(["exponent", *(f"{exponent(points, axis, line):.2f}" for line in LINES)])
        text += [*report.markdown(rows, left=0), ""]
    return [*text, f"![Time and activations against size]({picture.name})"] if picture else text


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """The plot, where matplotlib is installed."""
    if (pyplot := report.pyplot()) is None:
        return None
    axes = results["axes"]
    figure, panels = pyplot.subplots(len(LINES), len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for row, (line, label) in enumerate(LINES.items()):
        for column, (axis, points) in enumerate(axes.items()):
            panel = panels[row][column]
            panel.plot([p[axis] for p in points], [p[line] for p in points], "o-", color="#1f77b4")
            panel.set(xlabel=axis.replace("_", " "), ylabel=label)
            panel.set_xlim(left=0)
            panel.locator_params(axis="x", nbins=5)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def main() -> int:
    parser = report.parser(__doc__)
    report.add_device(parser)
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=tuple(AXES))
    chosen = parser.parse_args()
    results: dict[str, Any] = {"about": report.about(chosen.device, chosen.threads), "axes": {}}
    if chosen.json and chosen.json.exists():
        results["axes"] = json.loads(chosen.json.read_text(encoding="utf-8"))["axes"]
    for axis in chosen.axis:
        points = results["axes"][axis] = []
        for value in AXES[axis]:
            point = {**BASE, axis: value}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    points.append({**point, **measure_point(point, chosen.device, chosen.threads, folder)})
                except Refused as refused:
                    raise SystemExit(f"{point}: {refused}") from None
            print(f"{axis} {value}: " + ", ".join(f"{label} {number(points[-1][k])}" for k, label in LINES.items()))
        print("exponents: " + ", ".join(f"{line} {exponent(points, axis, line):.2f}" for line in LINES), flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        report.write(results, chosen.json, page(results, chosen.json, draw(results, chosen.json)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
