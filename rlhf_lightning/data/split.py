"""Chooses the held-out rows by their prompts, so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rlhf_lightning.data.rows import Record
from rlhf_lightning.errors import InputError


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """``(train, held out)`` in the order given; ``round(fraction x distinct prompts)`` are held out, at least 1.

    A prompt's rank depends only on (seed, prompt), so that rows added later move few others to the other side.

    Raises:
        InputError: there are fewer than two distinct prompts to split.
    """
    if fraction == 0:
        return list(records), []
    prompts = sorted({record.key for record in records}, key=lambda key: _hash(key, seed))
    if len(prompts) < 2:
        raise InputError(
            f"data.validation_fraction: {len(prompts)} distinct prompts cannot be split; "
            "give data.val_path, or set it to 0"
        )
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held_out = set(prompts[:count])
    train = [record for record in records if record.key not in held_out]
    return train, [record for record in records if record.key in held_out]


def _hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "backslashreplace"), digest_size=16).digest()
