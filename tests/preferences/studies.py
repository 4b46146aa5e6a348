"""Small studies for tests: candidate files, items and stores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Part, Store


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def candidates(path: Path, count: int, answers: int = 2) -> Path:
    """A file of ``count`` rows with ids r0, r1, ... and different answers."""
    rows = (
        {
            "id": f"r{i}",
            "prompt": f"question {i}",
            "completions": [f"answer {i}.{k}" for k in range(answers)],
            "policies": [f"p{k}" for k in range(answers)],
        }
        for i in range(count)
    )
    return write(path, rows)


def item(name: str, answers: int = 2, **fields: Any) -> Item:
    """An item with so many answers."""
    texts = tuple(f"{name} {k}" for k in range(answers))
    return Item(name, name, f"about {name}", texts, tuple(range(answers)), {}, **fields)


def store(path: Path, names: Iterable[str], task: str = "pairs", criteria: tuple[str, ...] = (), **study: Any) -> Path:
    """A store of real items with these names."""
    items: list[tuple[Part, Item]] = [("real", item(name)) for name in names]
    Store.create(path, {"task": task, "criteria": list(criteria), **study}, items)
    return path


def judged(client: str, name: str, choice: str = "first", annotator: str = "ann", **fields: Any) -> Judgement:
    """A judgement of a pair."""
    value = {"choice": choice, "strength": None}
    return Judgement(client, annotator, name, fields.pop("part", "real"), (0, 1), value, **fields)
