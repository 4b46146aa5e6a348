"""Texts that are far too long are told by their beginnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from rlhf_lightning.data.lengths import SLICE, surely_over

WORDS = "hello world, this is text. " * 40_000
LETTERS = "a" * 1_000_000


def counter(tokenizer: Tokenizer) -> tuple[Callable[[str], int], list[int]]:
    """Counts the tokens of a text, and remembers the lengths of what it was given."""
    asked: list[int] = []

    def count(text: str) -> int:
        asked.append(len(text))
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count, asked


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def word_marks() -> Tokenizer:
    """As Llama-2: the whole text is one word to it, with marks for spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return train(tokenizer)


def train(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False, **options)
    tokenizer.train_from_iterator(["hello world, this is text. aaaa"] * 4, trainer)
    return tokenizer


@pytest.mark.parametrize("tokenizer", [byte_level(), word_marks()], ids=["bytes", "marks"])
@pytest.mark.parametrize("text", [WORDS, LETTERS], ids=["words", "letters"])
@pytest.mark.parametrize("limit", [1, 1024, 20_000])
def test_a_megabyte_is_told_by_its_beginning(tokenizer: Tokenizer, text: str, limit: int) -> None:
    count, asked = counter(tokenizer)
    least = surely_over(text, limit, count)
    assert least is not None and least > limit
    assert sum(asked) < len(text) / 4
    # No more is claimed than there is.
    part = text[: sum(asked)]
    assert least <= count(part)


def test_what_the_whole_alone_can_tell_is_left_to_it() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    count, _ = counter(tokenizer)
    assert surely_over(LETTERS, 1024, count) is None  # one unknown word
    assert surely_over(" " * 1_000_000, 1024, count) is None  # nothing at all
    assert surely_over("hello " * 300_000, 1024, count) is not None


def test_a_text_that_may_fit_is_never_refused() -> None:
    count, _ = counter(byte_level())
    for text in ("hello world, this is text. " * 2000, "a" * (3 * SLICE), "a " * SLICE):
        tokens = count(text)
        assert surely_over(text, tokens, count) is None
        least = surely_over(text, tokens // 2, count)
        assert least is None or tokens // 2 < least <= tokens


def test_short_texts_are_not_looked_at() -> None:
    assert surely_over("a" * SLICE, 1, lambda text: pytest.fail("was tokenised")) is None
