"""How many of a file's prompts and responses a tokenizer would merge into one token where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError


def merging_borders(tokenizer: Any, records: Sequence[Record], at_most: int = 20_000) -> tuple[int, int, list[str]]:
    """Borders that merge, and those looked at: of so many responses at most, evenly spread.

    Returns: both counts, and what is wrong with the rows that have no tokens (as chats without a chat template).
    """
    encoder = Encoder(tokenizer, compared=at_most)
    encodable, refused = [], []
    for record in records:
        try:
            encoder.render(record)
            encodable.append(record)
        except InputError as error:
            refused.append(str(error))
    encoder.compare(encodable)
    return encoder.borders["merged"], encoder.borders["compared"], refused
