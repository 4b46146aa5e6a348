"""Hides special tokens that a user's text spells: each becomes one private character while the template renders.

So they are not mistaken for the special tokens that the template writes itself.
"""

from __future__ import annotations

from typing import Any

_FIRST, _LAST = 0x100000, 0x10FFF0  # Unicode's last plane, whose characters have no meaning of their own


def hide(
    messages: list[dict[str, Any]], tools: list[Any] | None, special: Any | None, known: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[Any] | None, dict[str, str]]:
    """Replaces every special token in messages and tools by one character. Also returns the token of each character.

    Args:
        messages: in the form that templates read.
        tools: in the form that templates read.
        special: the pattern of the tokens to hide; None hides nothing.
        known: the characters that are in use already, with their tokens.
    """
    hidden = dict(known or {})
    if special is None or not any(special.search(text) for text in texts_of([messages, tools])):
        return messages, tools, hidden
    there = "".join(texts_of([messages, tools]))
    free = (c for c in map(chr, range(_FIRST, _LAST)) if c not in there and c not in hidden)
    signs = {text: sign for sign, text in hidden.items()}

    def sign(found: Any) -> str:
        if found[0] not in signs:
            signs[found[0]] = next(free)
            hidden[signs[found[0]]] = found[0]
        return signs[found[0]]

    def change(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(sign, value)
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        return [change(item) for item in value] if isinstance(value, list) else value

    return [{**change(m), "role": m["role"]} if "role" in m else change(m) for m in messages], change(tools), hidden


def unhidden(value: Any, hidden: dict[str, str]) -> Any:
    """The text, list or object with the hidden tokens put back."""
    if isinstance(value, str):
        for sign, text in hidden.items():
            value = value.replace(sign, text)
        return value
    if isinstance(value, dict):
        return {key: unhidden(item, hidden) for key, item in value.items()}
    return [unhidden(item, hidden) for item in value] if isinstance(value, list) else value


def shown(beginning: str, whole: str, hidden: dict[str, str]) -> int | None:
    """Where ``beginning`` ends in ``whole``; None if ``whole`` does not begin with it.

    A token may be hidden in one of the two, where a user's text spells it, and plain in the other.
    """
    if whole.startswith(beginning):
        return len(beginning)
    if not hidden:
        return None
    i = j = 0
    while j < len(beginning):
        if i == len(whole):
            return None
        text = hidden.get(whole[i], whole[i]) if whole[i] != beginning[j] else whole[i]
        if not beginning.startswith(text, j):
            return None
        i, j = i + 1, j + len(text)
    return i


def texts_of(value: Any) -> list[str]:
    """Every text in a text, list or object, without the keys of objects."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_of(item)]
    return [text for item in value for text in texts_of(item)] if isinstance(value, list) else []
