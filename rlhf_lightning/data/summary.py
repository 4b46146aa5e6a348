"""What was made of the rows, in one line."""

from __future__ import annotations

from collections.abc import Mapping


def told(kind: str, train: int, held_out: int, left_out: str, answering: bool = False) -> str:
    """How much there is of what is used: of the held-out rows alone where nothing is trained on.

    Args:
        kind: what the rows were made: pairs, say.
        train: how many are trained on.
        held_out: how many are measured on, or answered.
        left_out: see `counts_text`.
        answering: whether they are answered.
    """
    if answering:
        return f"data: {held_out:,} {kind} to answer; {left_out}"
    used = f"{train:,} {kind} to train on, {held_out:,}" if train else f"{held_out:,} {kind}"
    return f"data: {used} held out; {left_out}"


def counts_text(dropped: Mapping[str, int], noted: Mapping[str, int]) -> str:
    """What is left out, and apart from it what is there and otherwise than one would expect."""
    text = _listed(dropped) or "nothing dropped"
    return f"{text}; noted: {_listed(noted)}" if noted else text


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what}: {count:,}" for what, count in sorted(counts.items()))
