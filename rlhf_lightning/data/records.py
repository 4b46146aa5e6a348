"""Files of rows, read and checked: every accepted form becomes one ``Record``.

A row that fits no form, or holds a value of the wrong type, is refused with file, line and key; a response that teaches
nothing (empty, or equal to the one it is compared with) is dropped and counted. Nothing else is changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_lightning.data.columns import Columns
from rlhf_lightning.data.files import RawRow, faulty_text, shown
from rlhf_lightning.data.forms import is_known, read_row
from rlhf_lightning.data.hints import COLUMNS
from rlhf_lightning.data.readers import interpreted, read_rows
from rlhf_lightning.data.refusals import Refusals
from rlhf_lightning.data.rows import Record, Row
from rlhf_lightning.data.values import refused
from rlhf_lightning.errors import InputError


@dataclass
class Records:
    """The rows of one or more files, with what was dropped on the way, by reason."""

    rows: list[Record]
    paths: tuple[str, ...]
    read: int  # rows read, dropped ones included
    dropped: Counter[str]
    noted: Counter[str] = field(default_factory=Counter)  # rows that are otherwise than one would expect

    def __len__(self) -> int:
        return len(self.rows)

    def check_prompts(self) -> None:
        """Refuses texts without a prompt, where prompts are to be answered.

        Raises:
            InputError: with the first one's place.
        """
        if texts := [row for row in self.rows if row.form.whole]:
            problem = (
                f"is no prompt to answer; give rows with 'prompt' ({len(texts):,} of {self.read:,} rows have none)"
            )
            raise refused(texts[0].where, "text", problem)

    def fingerprint(self) -> str:
        """Changes when any row's content or place in the order changes; renaming a file does not change it."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            content = (row.key, row.responses, row.pairs, row.margin, row.weight, row.columns)
            digest.update(repr(content).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def load_records(
    paths: str | Sequence[str],
    prompts: bool = False,
    columns: Columns | Mapping[str, str] | None = None,
    final: bool = True,
) -> Records:
    """Reads and checks files (or hub data sets) in the order given.

    Args:
        paths: the sources.
        prompts: to answer them, see `parse_row`.
        columns: for keys of ours, the names that the rows have for them, as ``{"prompt": "question"}``. One object for
            several calls: what one of them found is known in the next.
        final: refuse a name that no row had; False where more files are read with the same columns.

    Raises:
        InputError: for the first refused row (``path:line: key 'x': problem; remedy``), with the number of rows that
            are refused for the same cause; a source without rows; a column that no row has.
    """
    paths = (paths,) if isinstance(paths, str) else tuple(str(path) for path in paths)
    if not paths:
        raise InputError("data.path: no file is named; give at least one")
    records = Records([], paths, 0, Counter())
    names = columns if isinstance(columns, Columns) else Columns(columns)
    refusals = Refusals()
    for path in paths:
        before = records.read
        for item in checked_rows(path, records.dropped, prompts, names, records.noted):
            if isinstance(item, InputError):
                refusals.add(item)
            elif item is not None and not refusals:
                records.rows.append(replace(item, row=records.read - before, number=records.read))
            records.read += 1
        if records.read == before:
            raise InputError(f"{path}: contains no rows; give a file with at least one")
        if refusals:
            break
    if final:
        names.check()
    if refusals:
        raise refusals.error(records.read - before)
    if prompts:
        records.check_prompts()
    return records


def checked_rows(
    path: str,
    dropped: Counter[str],
    prompts: bool = False,
    columns: Columns | None = None,
    noted: Counter[str] | None = None,
) -> Iterator[Record | InputError | None]:
    """Each row of a source as a ``Record``, as the ``InputError`` that refuses it, or None where all of it was dropped.

    What is dropped is counted in ``dropped`` by reason; in ``noted``, what is otherwise than one would expect.
    """
    names = columns or Columns(None)
    noted = Counter() if noted is None else noted
    for line, raw in read_rows(path, lambda row: is_known(names.renamed(row))):
        if isinstance(raw, InputError):
            yield raw
            continue
        where = f"{path}:{line}"
        try:
            _check_texts(raw, where)
            # In JSON as in tables, null means that the row lacks the key.
            given = {key: value for key, value in raw.items() if value is not None}
            row = interpreted(path, where, names.apply(given, where))
            null = names.renamed(dict.fromkeys(key for key in raw if key not in given))
            record = parse_row(row, where, dropped, prompts, names.option, noted, tuple(null))
            if record is not None and len(given) < len(raw):  # what answers are written beside has them still
                record = replace(record, raw={**record.raw, **{key: None for key in raw if key not in given}})
            yield record
        except InputError as error:
            yield error


def _check_texts(row: RawRow, where: str) -> None:
    try:
        for key, value in row.items():
            if fault := faulty_text(key) or faulty_text(value):
                raise refused(where, shown(key), f"{fault}; repair the text")
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def parse_row(
    values: RawRow,
    where: str,
    dropped: Counter[str],
    prompts: bool = False,
    option: str = COLUMNS,
    noted: Counter[str] | None = None,
    null: Collection[str] = (),
) -> Record | None:
    """Checks one row of any form; None when nothing of it is left (the reason is counted in ``dropped``).

    With ``prompts`` a row is there for its prompt, whatever its responses: then it comes without them where they would
    have it dropped. ``option``: what gives columns other names, for messages. ``noted``: see `checked_rows`.
    ``null``: keys that the row has without a value.
    """
    reasons: Counter[str] = Counter()
    row = Row(values, where, reasons, Counter() if noted is None else noted, option, null)
    record = read_row(row)
    if prompts and row.made is not None and row.made.prompt:
        return record or replace(row.made, responses=(), pairs=())
    dropped.update(reasons)
    return record
