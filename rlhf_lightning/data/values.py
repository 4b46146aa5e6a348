"""Checks single values of a row. Each check returns the value, or raises an ``InputError`` with file, line and key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data.files import kind_of
from rlhf_lightning.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str  # empty if the row has null, as beside tool calls
    more: str = ""  # the message's other keys (`tool_calls`, `name`, ...) as a JSON object; empty if it has none

    def turn(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        more = json.loads(self.more) if self.more else {}
        content = None if not self.content and "tool_calls" in more else self.content
        return {"role": self.role, "content": content, **more}


# Messages of a prompt may end in the assistant's own words: a beginning that the response continues.
Prompt = str | tuple[Message, ...]
# Messages of a response begin and end with the assistant's; the user's or a tool's may stand between them.
Response = str | tuple[Message, ...]


def refused(where: str, key: str, problem: str) -> InputError:
    """The error that refuses a row: ``where`` is file and line."""
    return InputError(f"{where}: key '{key}': {problem}")


def checked_text(value: Any, where: str, key: str) -> str:
    """The value if it is a text, which may be empty."""
    if not isinstance(value, str):
        raise refused(where, key, f"must be text, got {kind_of(value)}; repair or delete the row")
    return value


def checked_list(value: Any, where: str, key: str) -> list[Any]:
    """The value if it is a list."""
    if not isinstance(value, list):
        raise refused(where, key, f"must be a list, got {kind_of(value)}; repair or delete the row")
    return value


def checked_number(value: Any, where: str, key: str) -> float:
    """The value as a float if it is a finite number. True and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(where, key, f"must be a number, got {kind_of(value)}; repair or delete the row")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise refused(where, key, "must be a finite number; repair or delete the row")
    return number
