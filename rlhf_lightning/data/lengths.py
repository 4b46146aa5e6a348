"""Recognises texts that are far too long by their beginnings, so that nobody waits for megabytes to be tokenised.

Callers ask `surely_over` before they tokenise a text that has a limit and will not be cut to it.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_lightning.errors import InputError

SLICE = 1 << 14  # characters that are tokenised at a time
# How many tokens a cut may add to the count: it may split a word, or remove a mark or a space.
_SLACK = 64


def surely_over(text: str, limit: int, count: Callable[[str], int]) -> int | None:
    """A number of tokens above ``limit`` that the text surely has, or None if the whole text must be tokenised to know.

    Slices are counted until they exceed the limit. For some tokenizers they never do: those that make one token of a
    word of any length, or none of white space.

    Args:
        text: any text; for texts of up to two slices the answer is None.
        limit: the most tokens that are allowed.
        count: counts the tokens of a text, without added special tokens.
    """
    if len(text) <= 2 * SLICE:
        return None
    tokens = start = 0
    while start < len(text):
        end = _word_end(text, start)
        tokens += max(0, count(text[start:end]) - _SLACK)
        if tokens > limit:
            return tokens
        start = end
    return None


def far_over(text: str, limit: int, count: Callable[[str], int]) -> bool:
    """Whether a text surely has more tokens than ``limit``, even if it is tokenised in pieces; see `surely_over`."""
    if len(text) <= 2 * SLICE:
        return count(text) > limit + _SLACK
    return surely_over(text, limit, count) is not None


def long_prompt(where: str, tokens: str, limit: int | None, rows: int, total: int) -> InputError:
    """The error that refuses a prompt, the first of ``rows`` rows whose prompts are too long."""
    return InputError(
        f"{where}: key 'prompt': {tokens} tokens are over data.max_prompt_tokens {limit} ({rows} of {total} rows are); "
        "raise it, or set data.long_prompts to drop or truncate_left"
    )


def long_response(where: str, tokens: str, limit: int | None, count: int, total: int) -> InputError:
    """The error that refuses a response, the first of ``count`` that are too long."""
    return InputError(
        f"{where}: a response of {tokens} tokens, EOS included, is over data.max_response_tokens {limit} "
        f"({count} of {total} are); raise it, or set data.long_responses to drop"
    )


def _word_end(text: str, start: int) -> int:
    """Where the slice from ``start`` ends: before its last space, unless that is its first character."""
    end = start + SLICE
    if end >= len(text):
        return len(text)
    space = text.rfind(" ", start + 1, end)
    return space if space > start else end
