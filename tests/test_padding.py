"""The count of padding that docs/performance.md shows."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rlhf_lightning.data.forms import Pair
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Example

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from padding import padding, tensors


def example(prompt: int, *responses: int) -> Example:
    record = Record("", (), (), "here", Pair())
    tokens = [torch.zeros(length, dtype=torch.int32) for length in (prompt, *responses)]
    return Example(tokens[0], tuple(tokens[1:]), 0.0, 1.0, 0, record)


def test_padding_is_what_the_rectangles_have_beyond_the_tokens() -> None:
    examples = [example(2, 4, 1), example(1, 1, 3), example(5, 5, 5)]
    # Sequences of 6, 3, 2 and 4 tokens in four rows of 6; then two of 10 without padding.
    assert padding(examples, [[0, 1], [2]]) == 1 - (15 + 20) / (24 + 20)
    tokens, lengths, prompts = tensors(examples, [0, 1])
    assert tokens.shape == (4, 6) and lengths.tolist() == [6, 3, 2, 4] and prompts.tolist() == [2, 2, 1, 1]
