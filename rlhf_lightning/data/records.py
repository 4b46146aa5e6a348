"""Files of rows, read and checked: every accepted form becomes one ``Record``.

A row that fits no form, or holds a value of the wrong type, is refused with file, line and key; a response that teaches
nothing (empty, or equal to the one it is compared with) is dropped and counted. Nothing else is changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlhf_lightning.data.forms import read_row
from rlhf_lightning.data.readers import RawRow, read_rows
from rlhf_lightning.data.rows import Record, Row
from rlhf_lightning.errors import InputError


@dataclass
class Records:
    """The rows of one or more files, with what was dropped on the way, by reason."""

    rows: list[Record]
    paths: tuple[str, ...]
    read: int  # rows read, dropped ones included
    dropped: Counter[str]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Changes when any row's content or place in the order changes; renaming a file does not change it."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            content = (row.key, row.responses, row.pairs, row.margin, row.weight, row.columns)
            digest.update(repr(content).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def load_records(paths: str | Sequence[str], prompts: bool = False) -> Records:
    """Reads and checks files (or hub data sets) in the order given; ``prompts``: to answer them, see `parse_row`.

    Raises:
        InputError: for the first refused row (``path:line: key 'x': problem; remedy``), or a source without rows.
    """
    paths = (paths,) if isinstance(paths, str) else tuple(str(path) for path in paths)
    if not paths:
        raise InputError("data.path: no file is named; give at least one")
    records = Records([], paths, 0, Counter())
    for path in paths:
        before = records.read
        for item in checked_rows(path, records.dropped, prompts):
            if isinstance(item, InputError):
                raise item
            if item is not None:
                records.rows.append(replace(item, row=records.read - before, number=records.read))
            records.read += 1
        if records.read == before:
            raise InputError(f"{path}: contains no rows; give a file with at least one")
    return records


def checked_rows(path: str, dropped: Counter[str], prompts: bool = False) -> Iterator[Record | InputError | None]:
    """Each row of a source as a ``Record``, as the ``InputError`` that refuses it, or None where all of it was dropped.

    What is dropped is counted in ``dropped`` by reason.
    """
    for line, raw in read_rows(path):
        if isinstance(raw, InputError):
            yield raw
            continue
        try:
            yield parse_row(raw, f"{path}:{line}", dropped, prompts)
        except InputError as error:
            yield error


def parse_row(values: RawRow, where: str, dropped: Counter[str], prompts: bool = False) -> Record | None:
    """Checks one row of any form; None when nothing of it is left (the reason is counted in ``dropped``).

    With ``prompts`` a row is there for its prompt, whatever its responses: then it comes without them where they would
    have it dropped.
    """
    reasons: Counter[str] = Counter()
    row = Row(values, where, reasons)
    record = read_row(row)
    if prompts and row.made is not None and row.made.prompt:
        return record or replace(row.made, responses=(), pairs=())
    dropped.update(reasons)
    return record
