"""The sizes of the newest forward pass: what an error says where memory runs out, in the pass or in its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Pass(NamedTuple):
    """One forward pass of a policy, a reward model or a critic."""

    rows: int
    tokens: int  # of each row, padding included
    vocabulary: int
    dtype: torch.dtype  # that products are computed in

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} rows x {self.tokens} tokens, vocabulary {self.vocabulary:,}, {dtype}"


_newest: Pass | None = None  # of the process: a failure is of the pass that ran last, whichever model's it was


def note(model: PreTrainedModel, tokens: Tensor) -> None:
    """Remembers that ``model`` is about to run on ``tokens``, ``[B, S]``."""
    global _newest
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    _newest = Pass(tokens.shape[0], tokens.shape[1], model.config.get_text_config().vocab_size, dtype)


def explain(error: BaseException, where: str, advice: Sequence[str]) -> None:
    """Gives an out-of-memory error the words that help: the sizes of the pass, and the options that make it smaller.

    The exception stays the one that torch raised, on the GPU or on the CPU, with its traceback; its message changes.

    Args:
        error: see `errors.out_of_memory`.
        where: the part of the work, or nothing.
        advice: what to change, the likeliest first.
    """
    reason = " ".join(str(error).split())[:300]
    begun = "before the first forward pass" if _newest is None else f"the last forward pass was of {_newest}"
    error.args = (f"out of memory{f' in {where}' if where else ''}: {begun}; {'; or '.join(advice)}; {reason}",)
