"""A checked row, the base class of the forms of rows, and the steps of reading that all forms share."""

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
    """A kind of row: which keys mark it, how it is read, and what it can be used for."""

    name: str  # in reports
    keys: str  # as reports and messages list them
    compared = False  # has better and worse responses
    labelled = False  # has one response that was judged by itself, in column `label`
    transcript = False  # its texts are of the form "\\n\\nHuman: ... \\n\\nAssistant:"
    key = ""  # the key that holds the whole row, if one does
    conversation = False  # the assistant's turns in its prompt are demonstrations, too
    whole = False  # has no prompt: the response is a text, learnt from its first token on

    def __str__(self) -> str:
        return self.name

    def matches(self, row: RawRow) -> bool:
        """Whether a row with these keys is meant to be of this form, even if keys are missing."""
        raise NotImplementedError

    def read(self, row: Row) -> Record | None:
        """Reads and checks the row. None if it is dropped; the reason is counted.

        Raises:
            InputError: a key is missing, or its value cannot be used.
        """
        raise NotImplementedError


_MOST = 1e6  # of a weight or a margin


@dataclass(frozen=True, slots=True)
class Record:
    """One checked row.

    ``responses`` are sorted best first, and none is empty. ``pairs`` are positions in ``responses``, the better one
    first. The demonstration of a row is its best response, unless that has a label.
    """

    prompt: Prompt  # text, empty if the form is `whole`; or messages, perhaps with the beginning of the answer
    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int], ...]
    where: str  # "file:line"
    form: Form
    margin: float = 0.0
    weight: float = 1.0
    preference: float = 1.0  # the probability that the better response of a pair is preferred, from 0.5 to 1
    columns: dict[str, Any] = field(default_factory=dict)  # the row's other keys, `id` among them
    tools: str = ""  # the row's tools as a JSON list, for the chat template; empty if it has none
    row: int = 0  # its number in its file, from 0
    number: int = 0  # its number in all files together, from 0, dropped rows included
    raw: RawRow = field(default_factory=dict, repr=False, compare=False)  # all of its keys, as they were read

    @property
    def key(self) -> str:
        """The prompt as one string, equal for equal prompts. Splitting and counting use it."""
        if self.form.whole:
            return str(self.responses[0]).strip()
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        turns = [[turn.role, turn.content, *([turn.more] if turn.more else [])] for turn in self.prompt]
        return json.dumps([*turns, self.tools] if self.tools else turns)

    @property
    def identity(self) -> tuple[str, str, str]:
        """Everything that rewards can tell rows apart by: the prompt, the tools and the columns."""
        return self.key, self.tools, json.dumps(self.columns, sort_keys=True, default=repr)

    @property
    def desirable(self) -> bool:
        """For a labelled row: whether its response is desirable. The label is a column, since rewards may read it."""
        return bool(self.columns["label"])

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a chat: a plain prompt becomes one user message, a transcript becomes its turns.

        Raises:
            InputError: the row is a text without a prompt. Chat templates have no place for such a text.
        """
        if self.form.whole:
            problem = "is learnt as it stands, outside of any chat template; set data.chat to false, or give a 'prompt'"
            raise refused(self.where, "text", problem)
        if not isinstance(self.prompt, str):
            return self.prompt
        return transcript_messages(self.prompt) if self.form.transcript else (Message("user", self.prompt),)

    def answer(self, number: int) -> tuple[Message, ...]:
        """Response ``number`` as messages that continue the chat ``messages``."""
        response = self.responses[number]
        if not isinstance(response, str):
            return response
        return (Message("assistant", response.strip() if self.form.transcript else response),)

    @property
    def text(self) -> str:
        """The prompt as the user wrote it; for a chat, its last user message."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((m.content for m in reversed(self.prompt) if m.role == "user"), self.prompt[-1].content)


class Row:
    """One raw row while a form reads it. Keys that the form takes are no columns; reward functions get the others."""

    def __init__(
        self,
        values: RawRow,
        where: str,
        dropped: Counter[str],
        noted: Counter[str],
        option: str,
        null: Collection[str] = (),
    ) -> None:
        self.option = option  # the option that renames columns
        self.values = values
        self.null = null  # keys whose value is null: the row is read without them, but messages name them
        self.where = where  # "file:line"
        self.dropped = dropped
        self.noted = noted
        self.columns = dict(values)
        self.tools: Any = None  # tools that the form found under another key than 'tools'
        self.parsed: Record | None = None  # the record with its prompt, even if the row is then dropped

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str) -> Any:
        """Takes the value of a key; None if the row lacks it. The key is then no column any more."""
        self.columns.pop(key, None)
        return self.values.get(key)

    def refused(self, key: str, problem: str) -> InputError:
        """The error that refuses the row."""
        return refused(self.where, key, problem)

    def drop(self, reason: str) -> None:
        """Counts the row, or one of its pairs, as dropped."""
        self.dropped[reason] += 1

    def note(self, what: str) -> None:
        """Counts the row as used, with something that users may not expect."""
        self.noted[what] += 1

    def record(
        self,
        form: Form,
        prompt: Prompt,
        responses: Sequence[Response] = (),
        pairs: Sequence[tuple[int, int]] = (),
    ) -> Record:
        """The checked row, with the keys that any form may have: ``margin``, ``weight``, ``system`` and ``tools``."""
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
        self.parsed = Record(
            prompt,
            tuple(responses),
            tuple(pairs),
            self.where,
            form,
            margin=margin,
            weight=weight,
            columns=self.columns,
            tools=tools,
            raw=self.values,
        )
        return self.parsed

    def _number(self, key: str, default: float) -> float:
        value = self.take(key)
        number = default if value is None else checked_number(value, self.where, key)
        if abs(number) > _MOST:
            raise self.refused(
                key, f"is {number:g}, and {_MOST:g} is the most that a float32 loss can hold beside others"
            )
        return number

    def _as_chat(self, prompt: Prompt, responses: Sequence[Response], tools: str) -> Prompt:
        """The prompt; as messages if the row has a system text, tools or message responses, which need a template."""
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
    """The turns of a transcript as chat messages, texts stripped, without the open Assistant turn at its end."""
    pieces = re.split(r"\n\n(Human|Assistant):", transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(roles[role], text.strip()) for role, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    opening = [Message("system", pieces[0].strip())] if pieces[0].strip() else []
    return tuple(opening + turns[:-1])


def said(response: Response) -> list[tuple[str, str, str]]:
    """The turns of a response as (role, text, other keys), without blanks around the texts."""
    turns = (Message("assistant", response),) if isinstance(response, str) else response
    return [(turn.role, turn.content.strip(), turn.more) for turn in turns]


def is_empty(response: Response) -> bool:
    """Whether the last answer has neither text nor a tool call."""
    return not any(said(response)[-1][1:])
