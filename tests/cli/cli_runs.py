"""What tests of whole commands read of a run: the line of an error, and the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def metrics(run: str) -> list[dict[str, Any]]:
    lines = Path(f"runs/{run}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
