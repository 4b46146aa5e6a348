"""Finds rows whose texts spell special tokens: users typed them, or a chat template was applied already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.values import Message

# Special tokens of most vocabularies, for use without a tokenizer.
LOOKS_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
)


def without_end(text: str, ends: Sequence[str]) -> str:
    """A response without an end token that its own text spells at its end, with or without blanks after it."""
    bare = text.rstrip()
    return next((bare.removesuffix(end) for end in ends if end and bare.endswith(end)), text)


def spelled(record: Record, pattern: re.Pattern[str], plain: Sequence[str] = (), turns: Sequence[str] = ()) -> set[str]:
    """The special tokens that the row's texts spell.

    Args:
        record: the row.
        pattern: the pattern of special tokens.
        plain: end tokens that do not count at the end of a plain response, since they become its end.
        turns: the same for the assistant's turns in a chat.
    """
    texts = [record.tools, *_texts(record.prompt, (), turns, open_end=True)]
    texts += [text for response in record.responses for text in _texts(response, plain, turns)]
    return {found for text in texts for found in pattern.findall(text)}


def count_spelled(
    records: Sequence[Record], pattern: re.Pattern[str], plain: Sequence[str] = (), turns: Sequence[str] = ()
) -> tuple[Counter[str], int]:
    """How many rows spell each token, and how many spell any."""
    found = [spelled(record, pattern, plain, turns) for record in records]
    return Counter(token for tokens in found for token in sorted(tokens)), sum(map(bool, found))


def _texts(
    words: str | tuple[Message, ...], plain: Sequence[str], turns: Sequence[str], open_end: bool = False
) -> list[str]:
    """The texts to search. With ``open_end`` the response continues the last message, so it has no end token."""
    if isinstance(words, str):
        return [without_end(words, plain)]
    ended = [m.role == "assistant" and not (open_end and m is words[-1]) for m in words]
    contents = (without_end(m.content, turns) if end else m.content for m, end in zip(words, ended, strict=True))
    return [*(m.more for m in words), *contents]
