"""Counts for ``data check`` what a tokenizer and its chat template make of a file's rows, merged borders among it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.data.conversations import Rendered
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError


def rendered_rows(tokenizer: Any, records: Sequence[Record], at_most: int = 20_000) -> tuple[Encoder, list[str]]:
    """Renders every response behind its prompt, and checks the borders of at most ``at_most`` of them, evenly spread.

    Returns: the encoder with its counts, and the messages about rows that cannot be encoded (as chats without a chat
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
