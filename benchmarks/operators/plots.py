"""Time and memory against N, V and T, one picture an operator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from operators.cases import LIMIT

# One colour for each of few lines, told apart by markers too; ours is the strongest.
STYLES = (("#1b5e9c", "o"), ("#d1782c", "s"), ("#5f9e6e", "^"), ("#8c6bb1", "D"))


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """The pictures written beside ``path``; none where matplotlib is not installed or nothing was swept."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plots: matplotlib is missing; run: pip install 'rlhf-lightning[plot]'", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    operators = dict.fromkeys(row["operator"] for row in results["sweeps"])
    path.parent.mkdir(parents=True, exist_ok=True)
    return [_picture(operator, results, path) for operator in operators]


def _picture(operator: str, results: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    rows = [row for row in results["sweeps"] if row["operator"] == operator]
    sizes = [size for size in rows[0]["shape"] if len({row["shape"][size] for row in rows}) > 1]
    figure, axes = pyplot.subplots(2, len(sizes), figsize=(5.2 * len(sizes) + 0.6, 6.6), squeeze=False)
    for column, size in enumerate(sizes):
        points = _points(rows, size)
        fixed = ", ".join(f"{name} = {value}" for name, value in points[0]["shape"].items() if name != size)
        axes[0, column].set_title(f"against {size}  ({fixed})", fontsize=11)
        _lines(axes[0, column], points, size, "ms")
        _lines(axes[1, column], points, size, "mb")
        axes[0, column].set_yscale("log")
        axes[1, column].set_yscale("symlog", linthresh=1.0)  # linear from 0 to 1, where a logarithm has no place for 0
        axes[1, column].set_ylim(0, max(1.0, 1.3 * axes[1, column].get_ylim()[1]))
        for axis, label in zip(axes[:, column], ("milliseconds", "MiB beyond inputs and results"), strict=True):
            axis.set_xlabel(size)
            axis.set_xscale("log", base=2)
            axis.set_xticks([point["shape"][size] for point in points])
            axis.set_xticklabels([f"{point['shape'][size]}" for point in points])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_ylabel(label if column == 0 else "")
            axis.grid(True, color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    facts = results["about"]
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(f"{operator}, {rows[0]['dtype']}, {rows[0]['pass']}", fontsize=13, y=0.985)
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False, bbox_to_anchor=(0.5, 0.955))
    figure.text(
        0.5, 0.008, f"{machine}, torch {facts['torch']}, {facts['date']}", ha="center", color="#666666", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.025, 1, 0.915))
    target = path.with_name(f"{path.stem}_{operator}.png")
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
    return target


def _points(rows: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """The rows along which ``size`` alone varies: all but the most frequent value of each other size are left out."""
    others = [name for name in rows[0]["shape"] if name != size]
    usual = {name: max(values := [row["shape"][name] for row in rows], key=values.count) for name in others}
    along = [row for row in rows if all(row["shape"][name] == usual[name] for name in others)]
    return sorted(along, key=lambda row: row["shape"][size])


def _lines(axis: Any, points: list[dict[str, Any]], size: str, kind: str) -> None:
    names = ["ours", *points[0]["peers"]]
    for name, (colour, marker) in zip(names, STYLES, strict=False):
        along = [
            (point["shape"][size], value)
            for point in points
            if (value := point[f"ours_{kind}"] if name == "ours" else _of_peer(point, kind).get(name)) is not None
        ]
        if along:
            axis.plot(*zip(*along, strict=True), color=colour, marker=marker, markersize=5, label=name)
    if kind == "ms":
        limits = [(point["shape"][size], point["limit_ms"]) for point in points if point["limit_ms"]]
        if limits:
            axis.plot(*zip(*limits, strict=True), color="#333333", linestyle=":", label=f"{LIMIT} of the machine")


def _of_peer(point: dict[str, Any], kind: str) -> dict[str, float]:
    found: dict[str, float] = point["peers"] if kind == "ms" else point["peers_mb"]
    return found
