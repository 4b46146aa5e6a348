"""Learning curves of several runs as stand-alone SVG files, from their metrics.jsonl.

    python examples/smollm2/curves.py "no KL=runs/smollm2-ppo-no-kl" "KL=runs/smollm2-ppo" --out docs/smollm2

It draws each metric of METRICS over the iterations, with one line per run. Each point is a mean over a few iterations.
It writes the raw numbers to curves.json beside the pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlhf_lightning.evaluation.charts import Series, line_chart
from rlhf_lightning.evaluation.curves import read_curves
from rlhf_lightning.evaluation.stand_alone import stand_alone

METRICS = {
    "score": ("objective/scores", "score, by the reward model"),
    "kl": ("objective/kl", "KL to the SFT model, nats a response"),
    "length": ("rollout/length", "tokens a response"),
    "truncated": ("rollout/truncated", "responses cut off by the limit, share"),
}


def smoothed(values: list[float], window: int) -> list[float]:
    """Each value's mean with those up to `window - 1` places before it."""
    starts = (max(0, i + 1 - window) for i in range(len(values)))
    return [sum(values[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the learning curves of several PPO runs.")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures and curves.json")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="which to draw")
    parser.add_argument("--window", type=int, default=5, help="iterations in a mean")
    options = parser.parse_args(arguments)
    runs = dict(run.split("=", 1) for run in options.runs)
    curves = {name: read_curves(Path(folder) / "metrics.jsonl") for name, folder in runs.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    for short in options.metrics:
        metric, label = METRICS[short]
        lines = [
            Series(name, curve[metric][0], smoothed(curve[metric][1], options.window), color=place + 1)
            for place, (name, curve) in enumerate(curves.items())
        ]
        figure = line_chart(label, lines, "iteration", label)
        (options.out / f"{short}.svg").write_text(stand_alone(figure), encoding="utf-8")
    numbers = {
        name: {m: [round(v, 4) for v in curve[m][1]] for m, _ in METRICS.values()} for name, curve in curves.items()
    }
    (options.out / "curves.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
