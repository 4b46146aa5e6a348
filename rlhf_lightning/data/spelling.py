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


def spelled(record: Record, pattern: re.Pattern[str], end: str = "") -> set[str]:
    """What the pattern finds in the row's texts.

    Args:
        record: the row.
        pattern: of special tokens.
        end: a token that may stand at a response's end, where it is taken for what ends it.
    """
    texts = [record.tools, *_texts(record.prompt)]
    for response in record.responses:
        *before, last = _texts(response) or [""]
        texts += [*before, last.removesuffix(end)]
    return {found for text in texts for found in pattern.findall(text)}


def count_spelled(records: Sequence[Record], pattern: re.Pattern[str], end: str = "") -> tuple[Counter[str], int]:
    """How many rows spell each token, and how many spell any."""
    found = [spelled(record, pattern, end) for record in records]
    return Counter(token for tokens in found for token in sorted(tokens)), sum(map(bool, found))


def _texts(words: str | tuple[Message, ...]) -> list[str]:
    return [words] if isinstance(words, str) else [text for m in words for text in (m.more, m.content)]
