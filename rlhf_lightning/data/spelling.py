"""Rows whose texts spell special tokens: as users type them, or as a chat template was applied to them already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.values import Message

# What special tokens look like in most vocabularies, for where there is no tokenizer to ask.
LOOKS_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
)


def without_end(text: str, ends: Sequence[str]) -> str:
    """A response without the token that ends it where it spells that itself, before blanks or none."""
    bare = text.rstrip()
    return next((bare.removesuffix(end) for end in ends if end and bare.endswith(end)), text)


def spelled(record: Record, pattern: re.Pattern[str], plain: Sequence[str] = (), turns: Sequence[str] = ()) -> set[str]:
    """What the pattern finds in the row's texts.

    Args:
        record: the row.
        pattern: of special tokens.
        plain: tokens that a response of text may spell at its end, where they are taken for what ends it.
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
    """With ``open_end`` the last message is gone on with, whoever says it, and so ends in nothing."""
    if isinstance(words, str):
        return [without_end(words, plain)]
    ended = [m.role == "assistant" and not (open_end and m is words[-1]) for m in words]
    contents = (without_end(m.content, turns) if end else m.content for m, end in zip(words, ended, strict=True))
    return [*(m.more for m in words), *contents]
