"""A checked row, the base of the forms that rows are read by, and what they share in reading."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.files import RawRow
from rlhf_lightning.data.messages import checked_tools
from rlhf_lightning.data.values import Message, Prompt, Response, checked_number, checked_text, refused
from rlhf_lightning.errors import InputError

_UNASKED = "conversation in which no user asks"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Form:
    """What a row is: how it is told apart, how it is read, and so what it can be used for."""

    name: str  # in reports
    keys: str  # as messages list them
    compared = False  # has better and worse responses
    labelled = False  # has one response that was judged by itself, in column `label`
    transcript = False  # its texts are of the form "\\n\\nHuman: ... \\n\\nAssistant:"
    key = ""  # that holds the whole row, where one does
    conversation = False  # the assistant's turns in its prompt are demonstrations, too
    whole = False  # has no prompt: the response is a text that is learnt from its first token on

    def __str__(self) -> str:
        return self.name

    def matches(self, row: RawRow) -> bool:
        """Whether a row of these keys is meant to be of this form, complete or not."""
        raise NotImplementedError

    def read(self, row: Row) -> Record | None:
        """The row, checked; None when nothing of it is left (the reason is counted).

        Raises:
            InputError: a key is missing, or its value cannot be used.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Record:
    """One checked row.

    ``responses`` stand best first and are never empty texts. ``pairs`` are positions in ``responses``, the better one
    first. A demonstration is the best response, where the row has any and does not label it.
    """

    prompt: Prompt  # text (empty where the form is `whole`), or messages: up to the one to answer, or its beginning
    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int], ...]
    where: str  # "file:line"
    form: Form
    margin: float = 0.0
    weight: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)  # the row's other keys, `id` among them
    tools: str = ""  # the row's tools as a JSON list, for the chat template; empty where it has none
    row: int = 0  # its number in its file, from 0
    number: int = 0  # its number in all files together, from 0; rows that are dropped have theirs
    raw: RawRow = field(default_factory=dict, repr=False, compare=False)  # all of its keys, as they were read

    @property
    def key(self) -> str:
        """The prompt as one string, equal for equal prompts: what splitting and counting go by."""
        if self.form.whole:
            return str(self.responses[0]).strip()
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        turns = [[turn.role, turn.content, *([turn.more] if turn.more else [])] for turn in self.prompt]
        return json.dumps([*turns, self.tools] if self.tools else turns)

    @property
    def identity(self) -> tuple[str, str, str]:
        """What rewards can tell a row by: its prompt, its tools and its columns."""
        return self.key, self.tools, json.dumps(self.columns, sort_keys=True, default=repr)

    @property
    def desirable(self) -> bool:
        """Of a labelled row: whether its response is one to give. A column like the others, as rewards may read it."""
        return bool(self.columns["label"])

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a chat: one user message where it is a text, the turns of a transcript.

        Raises:
            InputError: the row is a text without a prompt, which no chat template has a place for.
        """
        if self.form.whole:
            problem = "is learnt as it stands, outside of any chat template; set data.chat to false, or give a 'prompt'"
            raise refused(self.where, "text", problem)
        if not isinstance(self.prompt, str):
            return self.prompt
        return transcript_messages(self.prompt) if self.form.transcript else (Message("user", self.prompt),)

    def answer(self, number: int) -> tuple[Message, ...]:
        """Response ``number`` as what goes on with the chat ``messages``."""
        response = self.responses[number]
        if not isinstance(response, str):
            return response
        return (Message("assistant", response.strip() if self.form.transcript else response),)

    @property
    def text(self) -> str:
        """The prompt as the user wrote it; of a chat, the last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((m.content for m in reversed(self.prompt) if m.role == "user"), self.prompt[-1].content)


class Row:
    """One raw row while a form reads it. What the form takes is no longer a column that rewards are handed."""

    def __init__(
        self,
        values: RawRow,
        where: str,
        dropped: Counter[str],
        noted: Counter[str],
        option: str,
        null: Collection[str] = (),
    ) -> None:
        self.option = option  # what gives columns other names
        self.values = values
        self.null = null  # keys that it has without a value, for messages: it is read as if it lacked them
        self.where = where  # "file:line"
        self.dropped = dropped
        self.noted = noted
        self.columns = dict(values)
        self.tools: Any = None  # what the form found of them elsewhere than under their key
        self.made: Record | None = None  # also where its responses are of no use, and so it is dropped

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str) -> Any:
        """The value of a key, None where there is none."""
        self.columns.pop(key, None)
        return self.values.get(key)

    def refused(self, key: str, problem: str) -> InputError:
        """The error that refuses the row."""
        return refused(self.where, key, problem)

    def drop(self, reason: str) -> None:
        """Counts the row, or a pair of it, as left out."""
        self.dropped[reason] += 1

    def note(self, what: str) -> None:
        """Counts the row as one that is there, and otherwise than one would expect."""
        self.noted[what] += 1

    def record(
        self,
        form: Form,
        prompt: Prompt,
        responses: Sequence[Response] = (),
        pairs: Sequence[tuple[int, int]] = (),
    ) -> Record:
        """The checked row, with what may stand beside any form: ``margin``, ``weight``, ``system`` and ``tools``."""
        margin, weight, tools = self._number("margin", 0.0), self._number("weight", 1.0), ""
        if margin < 0:
            raise self.refused("margin", f"is {margin:g}, but the chosen response cannot be worse; swap the two")
        if weight <= 0:
            raise self.refused("weight", f"is {weight:g}; give a number above 0, or delete the row")
        if not (form.transcript or form.whole):
            tools = checked_tools(self.take("tools") or self.tools, self.where, "tools")
            prompt = self._as_chat(prompt, responses, tools)
            if isinstance(prompt, tuple) and not any(message.role in ("user", "tool") for message in prompt):
                self.note(_UNASKED)
        columns, raw = self.columns, self.values
        self.made = Record(
            prompt, tuple(responses), tuple(pairs), self.where, form, margin, weight, columns, tools, raw=raw
        )
        return self.made

    def _number(self, key: str, default: float) -> float:
        value = self.take(key)
        return default if value is None else checked_number(value, self.where, key)

    def _as_chat(self, prompt: Prompt, responses: Sequence[Response], tools: str) -> Prompt:
        """The prompt, as messages where the row has what only a chat template can put in its place."""
        system = self.take("system")
        system = "" if system is None else checked_text(system, self.where, "system")
        if isinstance(prompt, str) and (system.strip() or tools or any(not isinstance(r, str) for r in responses)):
            prompt = (Message("user", prompt),)
        if isinstance(prompt, str) or not system.strip():
            return prompt
        if prompt[0].role not in ("system", "developer"):
            return (Message("system", system), *prompt)
        if prompt[0].content.strip() != system.strip():
            raise self.refused("system", "differs from the system message in the conversation; keep one of the two")
        return prompt


def transcript_messages(transcript: str) -> tuple[Message, ...]:
    """The turns of a transcript that ends in an open Assistant turn, as chat messages; texts are stripped."""
    pieces = re.split(r"\n\n(Human|Assistant):", transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(roles[role], text.strip()) for role, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    opening = [Message("system", pieces[0].strip())] if pieces[0].strip() else []
    return tuple(opening + turns[:-1])


def said(response: Response) -> list[tuple[str, str, str]]:
    """What a response says, whatever blanks are around it."""
    turns = (Message("assistant", response),) if isinstance(response, str) else response
    return [(turn.role, turn.content.strip(), turn.more) for turn in turns]


def is_empty(response: Response) -> bool:
    """Whether the last answer is no text and no call of a tool."""
    return not any(said(response)[-1][1:])
