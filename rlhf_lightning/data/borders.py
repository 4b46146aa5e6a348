"""What a tokenizer and its chat template make of a file's rows, counted; among it borders that tokens would cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.conversations import Rendered
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError


def rendered_rows(tokenizer: Any, records: Sequence[Record], at_most: int = 20_000) -> tuple[Encoder, list[str]]:
    """Every response behind its prompt, rendered; of so many at most, evenly spread, the borders are looked at.

    Returns: the encoder that counted, and what is wrong with the rows that have no tokens (as chats without a chat
        template).
    """
    encoder = Encoder(tokenizer, compared=at_most)
    sequences: dict[Rendered, None] = {}
    refused = []
    for record in records:
        try:
            sequences.update(dict.fromkeys(encoder.render(record)))
        except InputError as error:
            refused.append(str(error))
    encoder.compare(list(sequences))
    return encoder, refused
