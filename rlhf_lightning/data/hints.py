"""Guesses what a row's keys were meant to be, for messages about rows that fit no form. No row is read by a guess."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_lightning.text import nearest

COLUMNS = "data.columns"  # the option that names columns in a configuration
# The names of our keys in other data sets.
_OTHER_NAMES = {
    "prompt": ("question", "query", "input", "problem", "instruction", "user", "context", "source"),
    "completion": ("response", "output", "answer", "target", "solution", "assistant", "reply", "summary"),
    "chosen": ("preferred", "better", "winner", "accepted", "response_chosen", "chosen_response", "answer_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "response_rejected", "rejected_response", "answer_rejected"),
    "completions": ("responses", "answers", "outputs", "candidates"),
    "ratings": ("scores", "rewards"),
    "ranks": ("ranking", "rank"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "label": ("kto_tag", "desirable"),
    "system": ("system_prompt", "system_message", "system_msg", "sys_prompt", "sys", "system_instruction"),
}


def meant(keys: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Maps wanted keys to the row's keys that likely mean them: a misspelling, or another data set's name."""
    left = list(keys)
    found: dict[str, str] = {}
    for name in wanted:
        lower = {key.lower().strip(): key for key in reversed(left)}
        near = nearest(name, lower, cutoff=0.8)
        other = [key for key in _OTHER_NAMES.get(name, ()) if key in lower]
        for key in [*([near] if near else []), *other][:1]:
            found[name] = lower[key]
            left.remove(lower[key])
    return found


def renaming(keys: Iterable[str], wanted: Iterable[str], option: str = COLUMNS) -> str:
    """A remedy such as ``set data.columns: {prompt: question}``; empty if no key of the row looks like a wanted one.

    Args:
        keys: the row's keys.
        wanted: our keys that the row lacks.
        option: the option that renames columns: ``data.columns``, or a command's ``--columns``.
    """
    found = meant(keys, wanted)
    if not found:
        return ""
    if option != COLUMNS:
        return f"add {option} {' '.join(f'{name}={key}' for name, key in found.items())}, or rename in the file"
    return f"set {option}: {{{', '.join(f'{name}: {key}' for name, key in found.items())}}}, or rename in the file"
