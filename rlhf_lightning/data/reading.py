"""Finds out which parts of a row's messages a chat template leaves out, so that none is lost silently."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.template import MARK, ChatTemplate, TemplateRefuses

REASONING = ("reasoning_content", "thinking", "reasoning")  # keys for reasoning, the most common first
UNREAD = "message with key '{}', which the chat template does not read"
_OWN = ("role", "content", "tool_calls")
_PROTOCOL = ("tool_call_id", "name")  # in a tool's message; a template need not read them
_ABSENT = object()
# A part of a response between marks, such as reasoning: <think>...</think>, [THINK]...[/THINK].
_PART = re.compile(r"([<\[])(\w+)([>\]])(.*?)(\1/\2\3)", re.S)


class Reading:
    """Tells what one template leaves out.

    Args:
        template: the chat template.
        noted: counts the messages with a key that the template does not read, by the key.
    """

    def __init__(self, template: ChatTemplate, noted: Counter[str]) -> None:
        self.template = template
        self.noted = noted
        self._shown: dict[tuple[Any, ...], set[int]] = {}  # by roles: the numbers of messages that are shown
        self._unread: dict[tuple[Any, ...], bool] = {}  # by key, and the kind of message it is in

    def check(self, where: str, messages: list[dict[str, Any]], tools: list[Any] | None, learnt: Sequence[int]) -> None:
        """Refuses a row if the template leaves out a message, or reasoning that is to be learnt.

        Args:
            where: file and line.
            messages: in the form that the template reads.
            tools: in the form that the template reads.
            learnt: the numbers of the assistant's messages that are learnt.

        Raises:
            InputError: names the message and its key.
        """
        sure = self._always_shown(messages, tools)
        for number, message in enumerate(messages):
            self._check_keys(where, messages[: number + 1], tools, number in learnt)
            calls, text = message.get("tool_calls") or [], message["content"] or ""
            of_assistant = message["role"] == "assistant"  # its words are checked elsewhere, unless it calls tools
            if calls and self._leaves_out(messages, tools, number, "tool_calls", []):
                raise left_out(where, message, number, "tool_calls")
            if number in sure or not text.strip() or (of_assistant and not calls):
                continue
            if self._leaves_out(messages, tools, number, "content", MARK):
                raise left_out(where, message, number, "content")

    def _check_keys(self, where: str, messages: list[dict[str, Any]], tools: list[Any] | None, learnt: bool) -> None:
        """Checks the other keys of the last message. Templates drop the reasoning of earlier ones by design."""
        message = messages[-1]
        known = (*_OWN, *(_PROTOCOL if message["role"] == "tool" else ()))
        keys = [key for key, value in message.items() if key not in known and not _is_empty(value)]
        unread = [key for key in keys if self._is_unread(messages, tools, key)]
        reasons = [key for key in keys if key in REASONING and isinstance(message[key], str | list | dict)]
        if learnt and reasons and all(key in unread for key in reasons):
            raise self._unlearnt(where, message, len(messages) - 1, reasons[0])
        for key in unread:
            self.noted[UNREAD.format(key)] += 1

    def _is_unread(self, messages: list[dict[str, Any]], tools: list[Any] | None, key: str) -> bool:
        """Whether the template ignores the key in such messages: it renders the same with another value or none."""
        last, before = messages[-1], messages[-2]["role"] if len(messages) > 1 else ""
        kind = (key, last["role"], before, bool(tools), bool(last.get("tool_calls")), bool(last["content"]), *last)
        if kind not in self._unread:
            place = len(messages) - 1
            self._unread[kind] = all(self._leaves_out(messages, tools, place, key, v) for v in (MARK, _ABSENT))
        return self._unread[kind]

    def _unlearnt(self, where: str, message: dict[str, Any], number: int, key: str) -> InputError:
        rest = {name: value for name, value in message.items() if name != key}
        for name in REASONING:
            try:
                if MARK in self.template.render([{"role": "user", "content": "a"}, {**rest, name: MARK}]):
                    problem = f"but reads {name}: rename the key"
                    break
            except TemplateRefuses:
                pass
        else:
            problem = "so it would not be learnt; set data.chat_template to one that reads it, or delete the key"
        return InputError(
            f"{where}: the chat template does not read {key} of message {number} (role {message['role']}), {problem}"
        )

    def _always_shown(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> set[int]:
        """The numbers of the messages that the template shows, whatever they say. Rendered once per order of roles."""
        roles = (bool(tools), *((message["role"], bool(message.get("tool_calls"))) for message in messages))
        if roles not in self._shown:
            marks = [f"{MARK}{number}{MARK}" for number in range(len(messages))]
            marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
            try:
                rendered = self.template.render(marked, tools)
            except TemplateRefuses:
                rendered = ""
            self._shown[roles] = {number for number, mark in enumerate(marks) if mark in rendered}
        return self._shown[roles]

    def _leaves_out(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, number: int, key: str, other: Any
    ) -> bool:
        """Whether the rendering stays the same if the key of a message gets another value, or is removed."""
        message = {name: value for name, value in messages[number].items() if name != key}
        message |= {key: other} if other is not _ABSENT else {}
        changed = [*messages[:number], message, *messages[number + 1 :]]
        try:
            return self.template.render(changed, tools) == self.template.render(messages, tools)
        except TemplateRefuses:
            return False  # a template that refuses the change reads the key


def left_out(where: str, message: dict[str, Any], number: int, key: str) -> InputError:
    """The error that refuses a row because the template leaves out a part of a message."""
    return InputError(
        f"{where}: the chat template leaves out {key} of message {number} (role {message['role']}); set "
        "data.chat_template to one that has a place for it, or delete the row"
    )


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing. False and 0 do say something."""
    if isinstance(value, str):
        return not value.strip()
    return value in (None, [], {})


def is_silent(message: dict[str, Any]) -> bool:
    """Whether a message has neither text nor any other key, such as tool calls."""
    return not (message["content"] or "").strip() and set(message) <= {"role", "content"}


def dropped_part(text: str, said: str) -> str:
    """The marks of a part of the text that is missing in ``said``, as ``<think>…</think>``; empty if no part is.

    If several parts are missing, the last: some templates drop everything before it, and with it earlier parts.
    """
    said = said.strip()
    for part in reversed(list(_PART.finditer(text))):
        if part[5] in said:
            continue
        words, after = part[4].strip(), text[part.end() :]
        rests = ((text[: part.start()] + after).strip(), after.strip())
        # Some templates write the words between other marks. Or the words may happen to occur in the rest of the text.
        if words not in said or any(_is_alone(rest, words, said) for rest in rests):
            return f"{part[1]}{part[2]}{part[3]}\u2026{part[5]}"
    return ""


def _is_alone(rest: str, words: str, said: str) -> bool:
    """Whether ``said`` begins with the rest of a text, and the words do not follow."""
    return said.startswith(rest) and not (words and words in said[len(rest) :])
