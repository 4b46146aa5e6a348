"""Reads and checks files of rows. Every accepted row becomes a ``Record``, whatever its form.

A row that fits no form, or holds a value of the wrong type, is refused with file, line and key. A response that teaches
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
    """The rows of one or more files, and the counts of what was dropped, by reason."""

    rows: list[Record]
    paths: tuple[str, ...]
    read: int  # rows read, dropped ones included
    dropped: Counter[str]
    noted: Counter[str] = field(default_factory=Counter)  # rows with something that users may not expect, by what it is

    def __len__(self) -> int:
        return len(self.rows)

    def check_prompts(self) -> None:
        """Refuses rows of the form ``text``, which have no prompt to answer.

        Raises:
            InputError: names the place of the first such row.
        """
        if texts := [row for row in self.rows if row.form.whole]:
            problem = (
                f"is no prompt to answer; give rows with 'prompt' ({len(texts):,} of {self.read:,} rows have none)"
            )
            raise refused(texts[0].where, "text", problem)

    def fingerprint(self) -> str:
        """A digest that changes with any row's content and with the order of rows, but not with the files' names."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            content = (row.key, row.responses, row.pairs, row.margin, row.weight, row.columns)
            content += (row.preference,) if row.preference < 1 else ()  # type: ignore[assignment]
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
        prompts: the prompts are to be answered, see `parse_row`.
        columns: maps our keys to the names that the rows have for them, as ``{"prompt": "question"}``. One ``Columns``
            for several calls remembers the columns that earlier calls found.
        final: refuse a column that no row had; False if more files will be read with the same columns.

    Raises:
        InputError: a row is refused; the message is about the first such row (``path:line: key 'x': problem; remedy``),
            with the number of rows refused for the same cause. Or a source has no rows, or no row has a column.
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
    """Yields for each row of a source its ``Record``, the ``InputError`` that refuses it, or None if it was dropped.

    ``dropped`` counts what is dropped, by reason. ``noted`` counts used rows with something that users may not expect.
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
            if record is not None and len(given) < len(raw):  # answers are written beside all of a row's keys
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
    """Checks one row of any form. None if it is dropped; the reason is counted in ``dropped``.

    With ``prompts`` only the prompt is needed: a row whose responses are unusable is kept without them. ``option`` is
    the option that renames columns, for messages. ``noted``: see `checked_rows`. ``null``: the keys with value null.
    """
    reasons: Counter[str] = Counter()
    row = Row(values, where, reasons, Counter() if noted is None else noted, option, null)
    record = read_row(row)
    if prompts and row.parsed is not None and row.parsed.prompt:
        return record or replace(row.parsed, responses=(), pairs=())
    dropped.update(reasons)
    return record
