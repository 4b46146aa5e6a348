"""The one line that says how many rows are used, and how many were left out and why."""

from __future__ import annotations

from collections.abc import Mapping


def told(kind: str, train: int, held_out: int, left_out: str, answering: bool = False) -> str:
    """The line about the rows in use. It leaves training rows out if there are none.

    Args:
        kind: what the rows became, as ``pairs``.
        train: how many are trained on.
        held_out: how many are measured on, or answered.
        left_out: see `counts_text`.
        answering: whether the rows are answered.
    """
    if answering:
        return f"data: {held_out:,} {kind} to answer; {left_out}"
    used = f"{train:,} {kind} to train on, {held_out:,}" if train else f"{held_out:,} {kind}"
    return f"data: {used} held out; {left_out}"


def counts_text(dropped: Mapping[str, int], noted: Mapping[str, int]) -> str:
    """The counts of dropped rows, then of used rows with something that users may not expect."""
    text = _listed(dropped) or "nothing dropped"
    return f"{text}; noted: {_listed(noted)}" if noted else text


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what}: {count:,}" for what, count in sorted(counts.items()))
