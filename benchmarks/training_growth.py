"""How do the time and the memory of our PPO step grow with prompts, vocabulary and response length?

    python benchmarks/training_growth.py [--axis prompts vocabulary new_tokens] [--device cpu|cuda] [--json FILE]

One size is changed at a time, each point in a process of its own; the step's update is one minibatch. Activations are
counted, not sampled: the bytes of all tensors that the passes of the update keep for their backwards (parameters aside,
shared storage once). Writes FILE, and beside it a page (.md) and a plot (.png); axes that are already in FILE and are
not measured now stay. The exponent of a line is its slope in the logarithms from the second-largest point to the
largest: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import provenance
import torch
from operators.report import number

HERE = Path(__file__).resolve().parent
BASE = {"prompts": 16, "vocabulary": 8192, "new_tokens": 48}
AXES = {
    "prompts": (8, 16, 32, 64),
    "vocabulary": (4096, 16384, 32768, 65536),
    "new_tokens": (24, 48, 96, 192),
}
LINES = {"seconds": "seconds a step", "activations_mb": "activations of the update, MB"}


def measure(point: dict[str, int], device: str, threads: int) -> dict[str, Any]:
    """One point, in a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "point.json"
        command = [sys.executable, "-m", "training.point", json.dumps(point), device, str(threads), folder, str(target)]
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{point} failed: {done.stderr.strip()[-2000:]}")
        return {**point, **json.loads(target.read_text())}


def exponent(points: list[dict[str, Any]], axis: str, line: str) -> float:
    """The slope between the two largest points, in logarithms."""
    first, second = points[-2:]
    return math.log(second[line] / first[line]) / math.log(second[axis] / first[axis])


def page(results: dict[str, Any], path: Path, picture: Path | None) -> str:
    """The facts of the JSON in Markdown."""
    text = ["# How a PPO step of ours grows", "", *provenance.header(results["about"], path)]
    text += [
        f"A Llama of 2 layers of width 128, float32, prompts of 8 to 32 tokens; where nothing else is said "
        f"{BASE['prompts']} prompts, vocabulary {BASE['vocabulary']} and {BASE['new_tokens']} new tokens. Policy, "
        "critic, reference and reward model; one minibatch. Attention is in the time of longer responses.",
        "",
    ]
    for axis, points in results["axes"].items():
        text += [f"| {axis} | " + " | ".join(LINES.values()) + " |", "|---:|" + "---:|" * len(LINES)]
        text += [f"| {point[axis]} | " + " | ".join(number(point[line]) for line in LINES) + " |" for point in points]
        text += ["| exponent | " + " | ".join(f"{exponent(points, axis, line):.2f}" for line in LINES) + " |", ""]
    if picture:
        text += [f"![Time and activations against size]({picture.name})", ""]
    return "\n".join(text)


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """The plot, where matplotlib is installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: matplotlib is missing; run: pip install 'rlhf-lightning[plot]'", file=sys.stderr)
        return None
    axes = results["axes"]
    figure, panels = pyplot.subplots(len(LINES), len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for row, (line, label) in enumerate(LINES.items()):
        for column, (axis, points) in enumerate(axes.items()):
            panel = panels[row][column]
            panel.plot([p[axis] for p in points], [p[line] for p in points], "o-", color="#1f77b4")
            panel.set_xlabel(axis.replace("_", " "))
            panel.set_ylabel(label)
            panel.set_xlim(left=0)
            panel.locator_params(axis="x", nbins=5)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=tuple(AXES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    results: dict[str, Any] = {"about": provenance.about(chosen.device, chosen.threads), "axes": {}}
    if chosen.json and chosen.json.exists():
        results["axes"] = json.loads(chosen.json.read_text(encoding="utf-8"))["axes"]
    for axis in chosen.axis:
        points = [measure({**BASE, axis: value}, chosen.device, chosen.threads) for value in AXES[axis]]
        results["axes"][axis] = points
        for point in points:
            print(f"{axis} {point[axis]}: " + ", ".join(f"{label} {number(point[k])}" for k, label in LINES.items()))
        print("exponents: " + ", ".join(f"{line} {exponent(points, axis, line):.2f}" for line in LINES), flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        chosen.json.with_suffix(".md").write_text(page(results, chosen.json, draw(results, chosen.json)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
