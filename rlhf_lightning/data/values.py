"""One value of a row, checked: the value itself, or an ``InputError`` that names file, line and key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data.readers import kind_of, shown
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


def checked_prompt(value: Any, where: str, key: str) -> Prompt:
    """A prompt as text that is not empty, or as messages up to the one to answer."""
    if isinstance(value, list):
        messages = checked_messages(value, where, key)
        if messages[-1].role == "assistant":
            raise refused(where, key, "the last message is the assistant's; end with the one to answer")
        return messages
    if isinstance(value, str) and not value.strip():
        raise refused(where, key, "is empty; give the text to answer, or delete the row")
    if not isinstance(value, str):
        raise refused(where, key, f"must be text or a list of messages, got {kind_of(value)}; repair the row")
    return value


def checked_response(value: Any, where: str, key: str) -> str:
    """A response as text, or as a list of one assistant message."""
    if not isinstance(value, list):
        return checked_text(value, where, key)
    messages = checked_messages(value, where, key)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise refused(where, key, "must be text or one assistant message; put earlier turns into the prompt")
    return messages[0].content


def checked_messages(value: Any, where: str, key: str) -> tuple[Message, ...]:
    """A list of one message or more, each with a known role and a text."""
    messages = []
    for i, item in enumerate(checked_list(value, where, key)):
        at = f"{key}[{i}]"
        if not isinstance(item, dict):
            raise refused(where, at, f"must be an object with role and content, got {kind_of(item)}")
        for name in ("role", "content"):
            if name not in item:
                raise refused(where, f"{at}.{name}", "is missing; a message has role and content")
        extra = next((name for name in item if name not in ("role", "content") and item[name] is not None), None)
        if extra is not None:
            raise refused(where, f"{at}.{shown(str(extra))}", "is not understood; a message has role and content alone")
        if item["role"] not in ROLES:
            raise refused(where, f"{at}.role", f"is {item['role']!r}; use one of {', '.join(ROLES)}")
        messages.append(Message(item["role"], checked_text(item["content"], where, f"{at}.content")))
    if not messages:
        raise refused(where, key, "is an empty list; give at least one message")
    return tuple(messages)


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
