"""Finds a row's prompt: under a key of its own, as an instruction, or before the answers of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_lightning.data.files import shown
from rlhf_lightning.data.hints import renaming
from rlhf_lightning.data.messages import checked_prompt
from rlhf_lightning.data.rows import Row
from rlhf_lightning.data.values import Message, Prompt, checked_text
from rlhf_lightning.errors import InputError

COMPARED = ("chosen", "rejected")
PROMPTS = ("prompt", "instruction", "question", "conversations", "messages")  # keys that may hold a prompt
NULL = "is null; give it a value, or delete the row"
_IGNORED_PROMPT = "prompt ignored, since the row's own conversation does not have it"


def missing(row: Row, key: str, wanted: Sequence[str]) -> InputError:
    """The error about a missing key: it names the keys that were found, and the option that may help."""
    if key in row.null:
        return row.refused(key, NULL)
    hint = renaming(
        (name for name in row.values if name not in wanted), [w for w in wanted if w not in row], row.option
    )
    found = ", ".join(sorted(map(shown, row.values))) or "none"
    problem = f"is missing; keys found: {found}" + (f"; {hint}" if hint else "")
    return row.refused(key, problem)


def demand(row: Row, keys: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Refuses a row that lacks one of the keys. ``beside`` names other keys of the form, which are no misspellings."""
    for key in keys:
        if key not in row:
            raise missing(row, key, (*keys, *beside))


def asked(row: Row, beside: Sequence[str]) -> Prompt:
    """The row's prompt, under any key that may hold one. ``beside`` names the form's keys that need a prompt."""
    key = next((key for key in PROMPTS if key in row), None)
    if key is None or (key == "question" and not any(side in row for side in COMPARED)):
        raise missing(row, "prompt", ("prompt", *beside))
    if key == "instruction":
        return instruction(row, "input")
    prompt = checked_prompt(row.take(key), row.where, key)
    if key in ("conversations", "messages") and isinstance(prompt, tuple) and prompt[-1].role == "assistant":
        raise row.refused(key, "the last message is the assistant's; end with the one that is answered")
    return prompt


def instruction(row: Row, input: str) -> str:
    """Instruction and input, with a line break between them if neither is empty."""
    texts = [checked_text(row.take("instruction"), row.where, "instruction")]
    given = row.take(input)
    texts += [] if given is None else [checked_text(given, row.where, input)]
    if row.take("history"):
        raise row.refused("history", "holds earlier turns; write the row as a list of 'messages'")
    if not any(text.strip() for text in texts):
        raise row.refused("instruction", "is empty; give the text to answer, or delete the row")
    return "\n".join(text for text in texts if text.strip())


def agreeing_prompt(row: Row, conversation: Sequence[Message]) -> None:
    """Takes the prompt beside a whole conversation, and notes the row if the conversation does not have that prompt."""
    given = row.take("prompt")
    if isinstance(given, list):
        asked = checked_prompt(given, row.where, "prompt")
        agrees = tuple(conversation[: len(asked)]) == asked
    else:
        agrees = given is None or any(str(given).strip() == message.content.strip() for message in conversation)
    if not agrees:
        row.note(_IGNORED_PROMPT)
