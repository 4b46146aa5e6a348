"""Reads learning curves from a run's ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.charts import Series

Curves = dict[str, tuple[list[float], list[float]]]


def read_curves(path: str | Path) -> Curves:
    """Every metric of a ``metrics.jsonl`` as (steps, values), in the order of the file.

    Lines are ``{"step": int, name: number, ...}``. A metric may be missing from a line. Null stands for a number that
    was not finite, and becomes NaN. An incomplete last line is left out, since a run may still be writing it.

    Raises:
        InputError: there is no such file, or a line is no such object; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file: give the metrics.jsonl that a run writes into its folder")
    curves: Curves = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: expected a JSON object with a 'step': remove the line") from error
        for name, value in row.items():
            if name not in ("step", "time") and (value is None or isinstance(value, (int, float))):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else float(value))
    return curves


def series(curves: Curves, metric: str, name: str = "", color: int | None = None) -> Series:
    """One metric as a line for a chart. For an unknown metric, raises an InputError that lists the known ones."""
    if metric not in curves:
        raise InputError(f"metric {metric!r}: not in the run's metrics; they are {', '.join(sorted(curves)) or 'none'}")
    steps, values = curves[metric]
    return Series(name or metric, steps, values, color=color)


def path_over(curves: Curves, across: str, up: str, name: str = "", color: int | None = None) -> Series:
    """One metric against another, at the steps where both were logged: a path for ``trajectory_chart``."""
    horizontal, vertical = (dict(zip(*_pair(curves, metric), strict=True)) for metric in (across, up))
    steps = [step for step in horizontal if step in vertical]
    return Series(name or up, [horizontal[s] for s in steps], [vertical[s] for s in steps], color=color)


def _pair(curves: Curves, metric: str) -> tuple[Sequence[float], Sequence[float]]:
    found = series(curves, metric)
    return found.x, found.y
