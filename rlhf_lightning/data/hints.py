"""What a row's keys were meant to be: for messages about rows that fit no form. Nothing is ever read by a guess."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_lightning.text import nearest

COLUMNS = "data.columns"  # the option that names columns in a configuration
# Names that other data sets have for ours.
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
    """For each wanted key the one of the row's keys that was likely meant: misspelt, or another data set's name."""
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
    """``set data.columns: {prompt: question}`` where a key was likely meant, else nothing.

    Args:
        keys: of the row.
        wanted: keys of ours that it lacks.
        option: what gives them other names: ``data.columns``, or a command's own ``--columns``.
    """
    found = meant(keys, wanted)
    if not found:
        return ""
    if option != COLUMNS:
        return f"add {option} {' '.join(f'{name}={key}' for name, key in found.items())}, or rename in the file"
    return f"set {option}: {{{', '.join(f'{name}: {key}' for name, key in found.items())}}}, or rename in the file"
