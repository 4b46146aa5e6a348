"""One value of a row, checked: the value itself, or an ``InputError`` that names file, line and key."""

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
    content: str  # empty where the row has null, as beside tool calls
    more: str = ""  # the message's other keys (`tool_calls`, `name`, ...) as a JSON object; empty where it has none

    def turn(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        more = json.loads(self.more) if self.more else {}
        content = None if not self.content and "tool_calls" in more else self.content
        return {"role": self.role, "content": content, **more}


# A prompt as messages may end in the assistant's own words: a beginning that the response goes on from.
Prompt = str | tuple[Message, ...]
# What follows a prompt. As messages: from an assistant's to an assistant's, with the user's or a tool's between them.
Response = str | tuple[Message, ...]


def refused(where: str, key: str, problem: str) -> InputError:
    """The error that refuses a row: ``where`` is file and line."""
    return InputError(f"{where}: key '{key}': {problem}")


def checked_text(value: Any, where: str, key: str) -> str:
    """A text, empty or not."""
    if not isinstance(value, str):
        raise refused(where, key, f"must be text, got {kind_of(value)}; repair or delete the row")
    return value


def checked_list(value: Any, where: str, key: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise refused(where, key, f"must be a list, got {kind_of(value)}; repair or delete the row")
    return value


def checked_number(value: Any, where: str, key: str) -> float:
    """A finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(where, key, f"must be a number, got {kind_of(value)}; repair or delete the row")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise refused(where, key, "must be a finite number; repair or delete the row")
    return number
