"""Stand-in until the real file is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Part
from rlhf_lightning.preferences.tasks import Task


def live(items: Sequence[tuple[Part, Item]], judgements: Sequence[Judgement], task: Task) -> dict[str, Any]:
    """Nothing yet."""
    return {"alpha": {}, "annotators": {}}
