"""metrics.jsonl back into curves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.curves import path_over, read_curves, series


def test_what_the_logger_writes_is_read_back(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"kl": 0.5, "scores": 1.0}, step=1)
    logger.log_metrics({"val/loss": 2.0}, step=1)
    logger.log_metrics({"kl": float("nan"), "scores": 2.0}, step=2)
    curves = read_curves(logger.path)
    assert set(curves) == {"kl", "scores", "val/loss"}
    assert curves["scores"] == ([1.0, 2.0], [1.0, 2.0])
    assert math.isnan(curves["kl"][1][1])
    line = series(curves, "val/loss", "validation", color=2)
    assert (line.name, list(line.x), list(line.y), line.color) == ("validation", [1.0], [2.0], 2)


def test_path_over_joins_by_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kl": 0.1, "gold": 5}\n{"step": 2, "kl": 0.2}\n{"step": 3, "kl": 0.3, "gold": 7}\n')
    joined = path_over(read_curves(path), "kl", "gold")
    assert list(joined.x) == [0.1, 0.3]
    assert list(joined.y) == [5.0, 7.0]


def test_torn_last_line_is_left_out_and_a_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kl": 0.1}\n{"step": 2, "k')
    assert read_curves(path)["kl"] == ([1.0], [0.1])
    path.write_text('{"step": 1, "kl": 0.1}\n[1]\n{"step": 2, "kl": 0.1}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: expected a JSON object with a 'step'"):
        read_curves(path)


def test_missing_file_and_unknown_metric_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_curves(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"'kl': not in the run's metrics; they are loss"):
        series({"loss": ([1.0], [2.0])}, "kl")
