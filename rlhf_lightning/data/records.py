"""Checked rows: every accepted form of demonstration, comparison and prompt becomes one ``Record``.

The forms are told apart by their keys (``FORMS``). A row that fits none, or holds a value of the wrong type, is refused
with file, line and key; a response that teaches nothing (empty, or equal to the one it is compared with) is dropped and
counted. Nothing else is changed: texts are kept byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_lightning.data.readers import RawRow, kind_of, read_rows, shown
from rlhf_lightning.data.values import (
    Message,
    Prompt,
    Response,
    checked_list,
    checked_messages,
    checked_number,
    checked_prompt,
    checked_response,
    checked_text,
    refused,
)
from rlhf_lightning.errors import InputError


@dataclass(frozen=True)
class Form:
    """What a row is, and so what it can be used for; `FORMS` has their keys."""

    name: str  # in reports
    compared: bool = False  # has better and worse responses
    labelled: bool = False  # has one response that was judged by itself, in column `label`
    transcript: bool = False  # its texts are of the form "\\n\\nHuman: ... \\n\\nAssistant:"
    conversation: bool = False  # the assistant's turns in its prompt are demonstrations, too

    def __str__(self) -> str:
        return self.name


PAIR, TRANSCRIPT = Form("pair", compared=True), Form("transcript", compared=True, transcript=True)
RANKING, RATING = Form("ranking", compared=True), Form("rating", compared=True)
DEMONSTRATION, LABELLED = Form("demonstration"), Form("labelled", labelled=True)
CHAT, PROMPT = Form("chat", conversation=True), Form("prompt")

FORMS = (
    "prompt+chosen+rejected",
    "chosen+rejected as transcripts with '\\n\\nHuman:' and '\\n\\nAssistant:' turns, or as chat messages",
    "prompt+completions+ranks",
    "prompt+completions+ratings",
    "prompt+completion",
    "prompt+completion+label",
    "messages",
    "prompt",
)
ACCEPTED = "; accepted forms: "  # ends a message about missing keys, before the forms
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_FORM_KEYS = frozenset(
    ["prompt", "chosen", "rejected", "completions", "ranks", "ratings", "completion", "messages", "margin", "weight"]
)
# Names that other formats have for ours, for a hint when a row is refused; never read silently.
_RENAMES = {"instruction": "prompt", "question": "prompt", "output": "completion", "response": "completion"}


@dataclass(frozen=True)
class Record:
    """One checked row.

    ``responses`` stand best first and are never empty texts. ``pairs`` are positions in ``responses``, the better one
    first. A demonstration is the best response, where the row has any and does not label it.
    """

    prompt: Prompt  # text, or the messages up to the one to answer
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

    @property
    def key(self) -> str:
        """The prompt as one string, equal for equal prompts: what splitting and counting go by."""
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        return json.dumps([[message.role, message.content] for message in self.prompt])

    @property
    def desirable(self) -> bool:
        """Of a labelled row: whether its response is one to give. A column like the others, as rewards may read it."""
        return bool(self.columns["label"])

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a chat: one user message where it is a text, the turns of a transcript."""
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


@dataclass
class Records:
    """The rows of one or more files, with what was dropped on the way, by reason."""

    rows: list[Record]
    paths: tuple[str, ...]
    read: int  # rows read, dropped ones included
    dropped: Counter[str]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Changes when any row's content or place in the order changes; renaming a file does not change it."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            content = (row.key, row.responses, row.pairs, row.margin, row.weight, row.columns)
            digest.update(repr(content).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def load_records(paths: str | Sequence[str]) -> Records:
    """Reads and checks files (or hub data sets) in the order given.

    Raises:
        InputError: for the first refused row (``path:line: key 'x': problem; remedy``), or a source without rows.
    """
    paths = (paths,) if isinstance(paths, str) else tuple(str(path) for path in paths)
    if not paths:
        raise InputError("data.path: no file is named; give at least one")
    records = Records([], paths, 0, Counter())
    for path in paths:
        before = records.read
        for item in checked_rows(path, records.dropped):
            if isinstance(item, InputError):
                raise item
            if item is not None:
                records.rows.append(replace(item, row=records.read - before, number=records.read))
            records.read += 1
        if records.read == before:
            raise InputError(f"{path}: contains no rows; give a file with at least one")
    return records


def checked_rows(path: str, dropped: Counter[str]) -> Iterator[Record | InputError | None]:
    """Each row of a source as a ``Record``, as the ``InputError`` that refuses it, or None where all of it was dropped.

    What is dropped is counted in ``dropped`` by reason.
    """
    for line, raw in read_rows(path):
        if isinstance(raw, InputError):
            yield raw
            continue
        try:
            yield parse_row(raw, f"{path}:{line}", dropped)
        except InputError as error:
            yield error


def parse_row(row: RawRow, where: str, dropped: Counter[str]) -> Record | None:
    """Checks one row of any form; None when nothing of it is left (the reason is counted in ``dropped``)."""
    compared = "chosen" in row or "rejected" in row
    listed = [key for key in ("completions", "ranks", "ratings") if key in row]
    if compared and listed:
        raise refused(where, listed[0], "stands beside 'chosen' and 'rejected'; keep one form of comparison")
    if compared:
        return _pair(row, where, dropped)
    if listed:
        return _listed(row, where, dropped)
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise refused(where, "messages", "stands beside 'prompt' or 'completion'; keep one of the two forms")
        return _chat(row, where, dropped)
    if "prompt" in row and "completion" in row:
        return _demonstration(row, where, dropped)
    if "prompt" in row:
        return _record(row, where, PROMPT, checked_prompt(row["prompt"], where, "prompt"), (), ())
    raise _missing(row, where, "prompt")


def _record(
    row: RawRow, where: str, form: Form, prompt: Prompt, responses: Sequence[Response], pairs: Sequence[tuple[int, int]]
) -> Record:
    margin = checked_number(row["margin"], where, "margin") if "margin" in row else 0.0
    weight = checked_number(row["weight"], where, "weight") if "weight" in row else 1.0
    if margin < 0:
        raise refused(where, "margin", f"is {margin:g}, but the chosen response cannot be worse; swap the two")
    if weight <= 0:
        raise refused(where, "weight", f"is {weight:g}; give a number above 0, or delete the row")
    columns = {key: value for key, value in row.items() if key not in _FORM_KEYS}
    return Record(prompt, tuple(responses), tuple(pairs), where, form, margin, weight, columns)


def _pair(row: RawRow, where: str, dropped: Counter[str]) -> Record | None:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise _missing(row, where, key)
    chosen, rejected = row["chosen"], row["rejected"]
    form = PAIR
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, texts = _chat_pair(row, where)
    elif "prompt" in row:
        prompt = checked_prompt(row["prompt"], where, "prompt")
        texts = (checked_response(chosen, where, "chosen"), checked_response(rejected, where, "rejected"))
    else:
        form = TRANSCRIPT
        prompt, texts = _transcripts(
            checked_text(chosen, where, "chosen"), checked_text(rejected, where, "rejected"), where
        )
        if not prompt:
            dropped["transcripts that part early"] += 1
            return None
    record = _record(row, where, form, prompt, texts, ((0, 1),))
    return record if _usable_pair(*texts, dropped) else None


def _usable_pair(better: str, worse: str, dropped: Counter[str]) -> bool:
    if not better.strip() or not worse.strip():
        dropped["empty response"] += 1
        return False
    if better.strip() == worse.strip():
        dropped["equal responses"] += 1
        return False
    return True


def _transcripts(chosen: str, rejected: str, where: str) -> tuple[str, tuple[str, str]]:
    """Splits both before their last answer: ``(common transcript, (answer, answer))``, an empty one if they differ."""
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if ASSISTANT not in text:
            problem = "there is no key 'prompt', and the text has no '\\n\\nAssistant:' turn"
            raise refused(where, key, f"{problem}; add the prompt, or write it as a transcript")
    cut = chosen.rindex(ASSISTANT) + len(ASSISTANT)
    other = rejected.rindex(ASSISTANT) + len(ASSISTANT)
    if chosen[:cut] != rejected[:other]:
        return "", ("", "")
    return chosen[:cut], (chosen[cut:], rejected[other:])


def transcript_messages(transcript: str) -> tuple[Message, ...]:
    """The turns of a transcript that ends in an open Assistant turn, as chat messages; texts are stripped."""
    pieces = re.split(r"\n\n(Human|Assistant):", transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(roles[role], text.strip()) for role, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    opening = [Message("system", pieces[0].strip())] if pieces[0].strip() else []
    return tuple(opening + turns[:-1])


def _chat_pair(row: RawRow, where: str) -> tuple[Prompt, tuple[str, str]]:
    """Chosen and rejected as messages: the answers alone (with a ``prompt``), or both whole conversations."""
    chosen = checked_messages(row["chosen"], where, "chosen")
    rejected = checked_messages(row["rejected"], where, "rejected")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant":
            raise refused(where, key, f"the last message is from '{messages[-1].role}'; end with the assistant's")
    if len(chosen) == len(rejected) == 1:
        if "prompt" not in row:
            raise refused(where, "prompt", "is missing, and chosen and rejected hold the answers alone; add it")
        prompt = checked_prompt(row["prompt"], where, "prompt")
    elif chosen[:-1] != rejected[:-1]:
        raise refused(where, "rejected", "the conversations differ before the last answer; make them the same")
    else:
        prompt = chosen[:-1]
    return prompt, (chosen[-1].content, rejected[-1].content)


def _listed(row: RawRow, where: str, dropped: Counter[str]) -> Record | None:
    """Rankings (1 is best) and ratings (more is better): every pair that is no tie, the best response's first."""
    by = [key for key in ("ranks", "ratings") if key in row]
    if len(by) == 2:
        raise refused(where, "ratings", "stands beside 'ranks'; keep one of them")
    missing = [key for key in ("prompt", "completions") if key not in row] + ([] if by else ["ranks' or 'ratings"])
    if missing:
        raise _missing(row, where, missing[0])
    prompt = checked_prompt(row["prompt"], where, "prompt")
    completions = checked_list(row["completions"], where, "completions")
    texts = [checked_response(text, where, f"completions[{i}]") for i, text in enumerate(completions)]
    grades = [
        checked_number(grade, where, f"{by[0]}[{i}]") for i, grade in enumerate(checked_list(row[by[0]], where, by[0]))
    ]
    if len(texts) < 2:
        raise refused(where, "completions", f"holds {len(texts)}; a comparison needs at least 2")
    if len(grades) != len(texts):
        raise refused(where, by[0], f"holds {len(grades)} for {len(texts)} completions; give one for each")
    if by == ["ranks"] and any(grade < 1 or grade != int(grade) for grade in grades):
        raise refused(where, "ranks", "must be whole numbers from 1 (best); equal numbers are ties")
    sign = 1 if by == ["ranks"] else -1
    order = sorted(range(len(texts)), key=lambda i: sign * grades[i])
    ranked = [(texts[i], grades[i]) for i in order]
    kept = [(text, grade) for text, grade in ranked if text.strip()]
    pairs = []
    for i, (better, grade) in enumerate(ranked):
        for worse, lower in ranked[i + 1 :]:
            if grade == lower:
                dropped["ties"] += 1
            elif _usable_pair(better, worse, dropped):
                pairs.append((kept.index((better, grade)), kept.index((worse, lower))))
    form = RANKING if by == ["ranks"] else RATING
    record = _record(row, where, form, prompt, [text for text, _ in kept], pairs)
    return record if kept else None


def _demonstration(row: RawRow, where: str, dropped: Counter[str]) -> Record | None:
    """A response to imitate; with a label, one that was judged by itself."""
    prompt = checked_prompt(row["prompt"], where, "prompt")
    response = checked_response(row["completion"], where, "completion")
    form = LABELLED if "label" in row else DEMONSTRATION
    if form.labelled and not isinstance(row["label"], bool):
        problem = (
            f"must be true (a response to give) or false, got {kind_of(row['label'])}; repair it, or rename the key"
        )
        raise refused(where, "label", problem)
    record = _record(row, where, form, prompt, (response,), ())
    if response.strip():
        return record
    dropped["empty response"] += 1
    return None


def _chat(row: RawRow, where: str, dropped: Counter[str]) -> Record | None:
    """A conversation: the last assistant message is the response; one that ends in a user message is a prompt alone."""
    messages = checked_messages(row["messages"], where, "messages")
    if messages[-1].role != "assistant":
        return _record(row, where, CHAT, messages, (), ())
    if len(messages) == 1:
        raise refused(where, "messages", "holds an answer without the message it answers; add the user's")
    record = _record(row, where, CHAT, messages[:-1], (messages[-1].content,), ())
    if messages[-1].content.strip():
        return record
    dropped["empty response"] += 1
    return None


def _missing(row: RawRow, where: str, key: str) -> InputError:
    found = ", ".join(sorted(map(shown, row))) or "none"
    hints = [f"rename '{name}' to '{ours}'" for name, ours in _RENAMES.items() if name in row and ours not in row]
    problem = "; ".join([f"is missing; keys found: {found}", *hints])
    return refused(where, key, f"{problem}{ACCEPTED}{' | '.join(FORMS)}")
