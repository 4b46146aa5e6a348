"""Texts that are far too long are told by their beginnings, so that nobody waits for megabytes to be tokenised.

`surely_over` is to be asked before a text is tokenised whole, where it has a limit and is not to be cut to it.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_lightning.errors import InputError

SLICE = 1 << 14  # characters that are tokenised at a time
# By how many tokens a cut may change the count beside it: a word cut in two, a mark or a space that is taken off there.
_SLACK = 64


def surely_over(text: str, limit: int, count: Callable[[str], int]) -> int | None:
    """A number of tokens over ``limit`` that the text has at least, or None where only its whole can tell.

    Slices are counted until there are enough. A tokenizer that makes one token of a word of any length, or none of
    white space, gets such a text whole: its slices never come to the limit.

    Args:
        text: any text; one of up to two slices is left to the tokenizer.
        limit: the most tokens that are allowed.
        count: the tokens of a text, without special ones that are added.
    """
    if len(text) <= 2 * SLICE:
        return None
    counted = start = 0
    while start < len(text):
        end = _word_end(text, start)
        counted += max(0, count(text[start:end]) - _SLACK)
        if counted > limit:
            return counted
        start = end
    return None


def far_over(text: str, limit: int, count: Callable[[str], int]) -> bool:
    """Whether a text has surely more tokens than ``limit``, also where it is tokenised in pieces; see `surely_over`."""
    if len(text) <= 2 * SLICE:
        return count(text) > limit + _SLACK
    return surely_over(text, limit, count) is not None


def long_prompt(where: str, tokens: str, limit: int | None, rows: int, total: int) -> InputError:
    """The error that refuses a prompt, the first of ``rows``."""
    return InputError(
        f"{where}: key 'prompt': {tokens} tokens are over data.max_prompt_tokens {limit} ({rows} of {total} rows are); "
        "raise it, or set data.long_prompts to drop or truncate_left"
    )


def long_response(where: str, tokens: str, limit: int | None, count: int, total: int) -> InputError:
    """The error that refuses a response, the first of ``count``."""
    return InputError(
        f"{where}: a response of {tokens} tokens, EOS included, is over data.max_response_tokens {limit} "
        f"({count} of {total} are); raise it, or set data.long_responses to drop"
    )


def _word_end(text: str, start: int) -> int:
    """Where the slice from ``start`` ends: before its last space, where it has one that is not its first character."""
    end = start + SLICE
    if end >= len(text):
        return len(text)
    space = text.rfind(" ", start + 1, end)
    return space if space > start else end
