"""Positions in right-padded sequences: the last token, the response, and the states that predict it.

Shapes: ``B`` rows, ``S`` prompt + response tokens, ``T`` response tokens of the longest response. Every function works
from lengths and never looks at token ids, so the pad token may be anything, EOS included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rlhf_lightning.batches import length_mask
from rlhf_lightning.errors import InputError


def at_last_token(x: Tensor, lengths: Tensor) -> Tensor:
    """``x[b, lengths[b] - 1]`` for every row: ``[B, S, ...]``, ``[B]`` -> ``[B, ...]``. Lengths are at least 1."""
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1]


def response_width(prompt_lengths: Tensor, lengths: Tensor) -> int:
    """``T``, the tokens of the longest response; 0 for a batch without rows.

    Raises:
        InputError: a prompt has no tokens, so nothing precedes (predicts) the first response token.
    """
    if lengths.numel() == 0:
        return 0
    # One transfer for both numbers: on a GPU each would wait for the queue.
    shortest, widest = torch.stack([prompt_lengths.min(), (lengths - prompt_lengths).max()]).tolist()
    if shortest < 1:
        raise InputError("a prompt has 0 tokens: give every prompt some text, or use a tokenizer that adds a BOS token")
    return max(int(widest), 0)


def response_mask(prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """True on response tokens: ``[B]``, ``[B]`` -> ``[B, T]`` bool."""
    return length_mask(lengths - prompt_lengths, response_width(prompt_lengths, lengths))


def response_states(x: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """What stands before each response token: ``[B, S, ...]`` -> ``[B, T, ...]``, zeros past the end.

    Slot ``t`` of row ``b`` is ``x[b, prompt_lengths[b] - 1 + t]``: the state that predicts response token ``t``,
    and whose value the critic estimates.
    """
    mask = response_mask(prompt_lengths, lengths)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = prompt_lengths[:, None] - 1 + torch.arange(mask.shape[1], device=x.device)[None, :]
    picked = x[rows, torch.where(mask, columns, 0)]
    # masked_fill, not a product: what stands past the end may be NaN.
    return picked.masked_fill(~mask.reshape(mask.shape + (1,) * (x.dim() - 2)), 0)


def rope_limit(config: PretrainedConfig) -> int | None:
    """The tokens up to which rotary positions are the same for any batch; None where they always are.

    LongRoPE (Phi-3.5, Phi-4-mini) takes other angles, for all rows of a call, once the longest row in it passes the
    length that the model was first trained for; dynamic NTK scaling likewise past the model's own length.
    """
    text: Any = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            limits.append(original or text.max_position_embeddings)
        elif kind == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)
