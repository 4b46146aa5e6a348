"""Makes right-padded batches of examples. A filler row is an example of weight 0."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, LabelledBatch, PreferenceBatch, PromptBatch
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.sequences import Array
from rlhf_lightning.data.tokenization import Example
from rlhf_lightning.errors import check_choice

Batch = DemonstrationBatch | PreferenceBatch | LabelledBatch | PromptBatch


def collate(
    examples: Sequence[Example], kind: Kind, pad_id: int, columns: Sequence[str] = (), demonstrations: bool = False
) -> Batch:
    """One batch of ``B = len(examples)`` rows; ``columns`` names the columns that a prompt batch carries, and
    ``demonstrations`` says whether it carries the rows' responses."""
    check_choice("kind", kind, Kind)
    if kind == "pairs":
        return PreferenceBatch(
            chosen=_side(examples, 0, pad_id),
            rejected=_side(examples, 1, pad_id),
            margins=torch.tensor([example.margin for example in examples], dtype=torch.float32),
            weights=_weights(examples),
            preferences=_preferences(examples),
        )
    if kind == "demonstrations":
        return _side(examples, 0, pad_id)
    if kind == "labels":
        desirable = torch.tensor([example.record.desirable for example in examples])
        return LabelledBatch(responses=_side(examples, 0, pad_id), desirable=desirable)
    tokens, lengths = _pad([example.prompt for example in examples], pad_id)
    return PromptBatch(
        tokens=tokens,
        lengths=lengths,
        rows=torch.tensor([example.row for example in examples]),
        weights=_weights(examples),
        prompts=[example.record.text for example in examples],
        columns={name: [example.record.columns.get(name) for example in examples] for name in columns},
        demonstrations=_demonstrations(examples, pad_id) if demonstrations else None,
        conversations=[_conversation(example) for example in examples] if any(e.chat for e in examples) else None,
    )


def column_names(examples: Sequence[Example]) -> list[str]:
    """The names of all columns that any row has. In a batch, a row without a column carries None."""
    names: dict[str, Any] = {}
    for example in examples:
        names.update(example.record.columns)
    return sorted(names)


def _conversation(example: Example) -> dict[str, Any] | None:
    """The prompt as chat templates read it, uncut even if its ids were cut; None for plain text."""
    record = example.record
    if not example.chat:
        return None
    tools = json.loads(record.tools) if record.tools else None
    return {"messages": [message.turn() for message in record.messages], "tools": tools}


def _demonstrations(examples: Sequence[Example], pad_id: int) -> DemonstrationBatch:
    """The responses of the prompts. A prompt without one gets an empty response of weight 0, so that rows match."""
    empty = np.zeros(0, dtype=np.int32)
    filled = [e if e.responses else replace(e, responses=(empty,), masks=(), weight=0.0) for e in examples]
    return _side(filled, 0, pad_id)


def _side(examples: Sequence[Example], side: int, pad_id: int) -> DemonstrationBatch:
    tokens, lengths = _pad([np.concatenate([example.prompt, example.responses[side]]) for example in examples], pad_id)
    return DemonstrationBatch(
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=torch.tensor([len(example.prompt) for example in examples]),
        weights=_weights(examples),
        spoken=_spoken(examples, side),
    )


def _spoken(examples: Sequence[Example], side: int) -> Tensor | None:
    """``[B, T]`` bool, True for tokens that the assistant says; None if it says all of every response."""
    masks = [example.masks[side] if example.masks else None for example in examples]
    if all(mask is None for mask in masks):
        return None
    whole = [
        torch.ones(len(example.responses[side]), dtype=torch.bool) if mask is None else torch.from_numpy(mask)
        for example, mask in zip(examples, masks, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)


def _preferences(examples: Sequence[Example]) -> Tensor | None:
    """``[B]`` float32; None if all pairs are certain."""
    found = [example.record.preference for example in examples]
    return None if all(p == 1 for p in found) else torch.tensor(found, dtype=torch.float32)


def _weights(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.weight for example in examples], dtype=torch.float32)


def _pad(rows: Sequence[Array], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of int32 ids to ``[B, S]`` int64 and their lengths ``[B]`` int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(row).long() for row in rows], batch_first=True, padding_value=pad_id
    )
    return tokens, lengths


def encoding(examples: Sequence[Example], kind: Kind) -> str:
    """A digest that changes with any token of any example. It ignores demonstrations beside prompts."""
    check_choice("kind", kind, Kind)
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for ids in (example.prompt, *(() if kind == "prompts" else example.responses)):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest()
