"""Chooses the prompts to answer from their files, and counts the rows that are left out, by reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from rlhf_lightning.data.columns import Columns
    from rlhf_lightning.data.rows import Record


@dataclass(frozen=True)
class Asked:
    """The prompts to answer, in the files' order."""

    prompts: list[Record]
    read: int  # rows in the files
    left_out: dict[str, int]  # rows by reason

    def summary(self) -> str:
        """One line, like ``5 of 9 rows; left out: repeated prompts 4``."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.items())
        return f"{len(self.prompts):,} of {self.read:,} rows; left out: {reasons or 'none'}"


def asked(paths: Sequence[str], limit: int | None, columns: Columns | None = None, final: bool = True) -> Asked:
    """Each prompt once, at most ``limit`` of them, evenly spread over the files.

    Rows that differ in a column which a reward can read count as different prompts. ``columns`` and ``final``: see
    `load_records`.

    Raises:
        InputError: see `load_records`; or no row is left.
    """
    from rlhf_lightning.data.records import load_records

    records = load_records(paths, prompts=True, columns=columns, final=final)
    distinct: dict[tuple[str, str, str], Record] = {}
    for record in records.rows:
        distinct.setdefault(record.identity, record)
    prompts = list(distinct.values())
    left_out = {**dict(sorted(records.dropped.items())), "repeated prompts": len(records.rows) - len(prompts)}
    if not prompts:
        raise InputError("--prompts: every row was dropped: give rows with a prompt")
    if limit is not None and limit < len(prompts):
        left_out[f"over --max_prompts {limit}"] = len(prompts) - limit
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return Asked(prompts, records.read, {reason: count for reason, count in left_out.items() if count})
