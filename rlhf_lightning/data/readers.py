"""Reads JSON (lines or a list), CSV, Parquet and hub data sets as numbered rows of plain Python values.

A reader yields ``(line, row)``. ``row`` is a dict, or the ``InputError`` that says what is wrong with that line. So a
caller may stop at the first error (training) or list all of them (``data check``). Lines are counted from 1; the rows
of JSON lists, Parquet and hub data sets count as lines.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf_lightning.data.files import (
    GROWTH,
    ROW,
    WHOLE,
    Numbered,
    RawRow,
    most_held,
    not_utf8,
    reading,
    shown,
    too_long,
)
from rlhf_lightning.data.json_rows import read_json
from rlhf_lightning.data.messages import speaking
from rlhf_lightning.data.values import refused
from rlhf_lightning.errors import InputError
from rlhf_lightning.text import alike

_JSON = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_LIST_CELLS = ("completions", "ranks", "ratings", "messages", "conversations", "tools")
_MESSAGE_CELLS = (
    *("prompt", "question", "chosen", "rejected", "completion", "output", "response", "response_j", "response_k"),
    *("preferred_output", "non_preferred_output"),
)
_NUMBER_CELLS = ("margin", "preference", "weight")
_OPTIONAL_CELLS = ("label", "system", "input")
_PARQUET_ROWS = 64  # read at once: a repeated value of a few bytes in the file may be many in memory


def read_rows(path: str, is_row: Callable[[RawRow], bool]) -> Iterator[Numbered]:
    """The rows of one source: a file by its suffix, else a hub data set ``owner/name`` or ``owner/name:split``.

    Args:
        path: the source.
        is_row: tells whether the only JSON object of a file is a row itself; else it holds the list of rows.

    Raises:
        InputError: no such file, an unknown suffix, an unreadable file, or a missing optional package.
    """
    name = path.lower()
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; name the data files in it")
    if name.endswith(_JSON):
        return read_json(path, is_row)
    if name.endswith(".csv"):
        return _read_csv(path)
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if Path(path).exists():
        raise InputError(f"{path}: unknown kind of file; use .jsonl, .json, .csv or .parquet")
    if _HUB_NAME.fullmatch(path):
        return _read_hub(path)
    known = "a .jsonl, .json, .csv or .parquet file, or a hub data set's name"
    raise InputError(f"{path}: no such file{alike(Path(path), Path.is_file)}; give {known}")


def _read_csv(path: str) -> Iterator[Numbered]:
    with reading(path) as file:
        try:
            yield from _csv_rows(path, csv.reader(_text_lines(path, file), strict=True))
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _text_lines(path: str, file: IO[bytes]) -> Iterator[str]:
    lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        for number in itertools.count(1):
            if len(line := lines.readline(ROW + 1)) > ROW:
                raise too_long(path, number)
            line = line.removeprefix("\ufeff") if number == 1 else line
            if not line:
                return
            yield line
    finally:
        lines.detach()  # the file is closed by whoever has opened it


def _not_utf8(path: str) -> InputError:
    """The error for a file of which a part is not UTF-8: finds the byte."""
    start = 0
    with reading(path) as file:
        for line, piece in enumerate(file, 1):
            try:
                piece.decode("utf-8")
            except UnicodeDecodeError as error:
                return not_utf8(path, line, error, start)
            start += len(piece)
    return InputError(f"{path}: not UTF-8; save the file as UTF-8")


def _next_cells(reader: Any) -> list[str] | None:
    """The next row, with cells as long as a row may be: csv's own limit, the same for all readers, is 128 KiB."""
    limit = csv.field_size_limit(ROW)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: str, reader: Any) -> Iterator[Numbered]:
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            yield line, InputError(f"{path}:{line}: not valid CSV ({error}); check the quotes")
            return
        if cells is None:
            return
        if not cells:  # a blank line
            pass
        elif header is None:
            header = cells
            other = next((mark for mark in (";", "\t", "|") if len(cells) == 1 and mark in cells[0]), None)
            if other:
                raise InputError(f"{path}:{line}: the columns stand between {other!r}; save the file with commas")
            for name in header:
                if header.count(name) > 1:
                    raise InputError(f"{path}:{line}: key '{shown(name)}': two columns have this name; rename one")
        elif len(cells) != len(header):
            message = f"{path}:{line}: {len(cells)} cells under {len(header)} column names; check commas and quotes"
            yield line, InputError(message)
        else:
            yield line, dict(zip(header, cells, strict=True))
        line = reader.line_num + 1


def interpreted(path: str, where: str, cells: RawRow) -> RawRow:
    """Converts the cells of a table to values: lists, numbers and messages. The keys are our names already.

    CSV has only text: lists are written as JSON in their cell, and numbers as digits. An empty cell means that there is
    no value. Text in place of a list is read as JSON in other tables, too. A prompt or a response is text, unless its
    cell is the JSON of messages. Values of JSON files are left as they are.

    Raises:
        InputError: a cell that must hold a list or a number holds something else.
    """
    name = path.lower()
    if name.endswith(_JSON):
        return cells
    row, csv_cells = dict(cells), (*_NUMBER_CELLS, *_OPTIONAL_CELLS) if name.endswith(".csv") else ()
    for key in (*_LIST_CELLS, *csv_cells):
        if not isinstance(row.get(key), str):
            continue
        if not row[key].strip():
            del row[key]
            continue
        if key in _OPTIONAL_CELLS:
            continue
        try:
            row[key] = float(row[key]) if key in _NUMBER_CELLS else json.loads(row[key])
        except (ValueError, RecursionError):
            wanted, remedy = ("a JSON list", "write it with json.dumps")
            if key in _NUMBER_CELLS:
                wanted, remedy = "a number", "repair or empty it"
            raise refused(where, key, f"the cell must hold {wanted}, got {_clip(row[key])}; {remedy}") from None
    for key in (*_MESSAGE_CELLS, *(["input"] if "preferred_output" in row else [])):
        if isinstance(row.get(key), str) and re.match(r"\s*[\[{]", row[key]):
            row[key] = _messages_or_text(row[key])
    return row


def _messages_or_text(cell: str) -> Any:
    """The messages if the cell is their JSON: one, a list, or an object with the list. Else the text as it is."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    if isinstance(value, dict) and isinstance(value.get("messages"), list):  # the input beside preferred outputs
        return value if _are_messages(value["messages"]) else cell
    return value if _are_messages(value if isinstance(value, list) else [value]) else cell


def _are_messages(values: list[Any]) -> bool:
    objects = [value for value in values if isinstance(value, dict)]
    spoken = [value for value in objects if speaking(value.get("role", value.get("from"))) is not None]
    said = ("content", "value", "tool_calls", "function_call")
    return bool(values) and len(objects) == len(values) and any(any(key in value for key in said) for value in spoken)


def _clip(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _read_parquet(path: str) -> Iterator[Numbered]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow; run: pip install 'rlhf-lightning[parquet]'") from None
    line = 0
    with reading(path) as source:
        try:
            file = pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20)
            _check_columns(path, file.schema_arrow)
            numbers, most = range(file.metadata.num_row_groups), most_held(path)
            _check_growth(path, sum(file.metadata.row_group(number).total_byte_size for number in numbers), most)
            held = 0  # unlike the sum above, with every repetition of a value that the file has once
            for batch in file.iter_batches(_PARQUET_ROWS):
                if batch.nbytes > WHOLE:
                    raise InputError(f"{path}:{line + 1}: {len(batch)} rows with more than {WHOLE >> 30} GiB")
                _check_growth(path, held := held + batch.nbytes, most)
                for row in batch.to_pylist():
                    line += 1
                    yield line, _without_nulls(row)
        except InputError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: not a readable Parquet file ({reason}); write it again") from None


def _check_growth(path: str, held: int, most: int) -> None:
    """Refuses a file that holds more bytes than text does, compared with its size."""
    if held > most:
        raise InputError(
            f"{path}: holds more than {GROWTH} times its size, far more than text does; look what it is, and write it "
            "without compression if it is right"
        )


def _read_hub(path: str) -> Iterator[Numbered]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{path}: no such file; to read the hub data set of that name run: pip install 'rlhf-lightning[hub]'"
        ) from None
    name, _, split = path.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the package raises any type: no network, no such name, no such split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: no such file, and the hub data set cannot be loaded ({reason})") from None
    for line, row in enumerate(rows, 1):
        yield line, _without_nulls(dict(row))


def _check_columns(path: str, fields: Any) -> None:
    """Refuses two columns of the same name, also inside structs."""
    names = [field.name for field in fields]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{path}: key '{shown(name)}': two columns have this name; rename one")
    for field in fields:
        kind = field.type
        while hasattr(kind, "value_type"):  # lists
            kind = kind.value_type
        if hasattr(kind, "fields") and kind.num_fields:
            _check_columns(path, [kind.field(i) for i in range(kind.num_fields)])


def _without_nulls(row: RawRow) -> RawRow:
    """The row without its nulls. A table has every column in every row, so null means that the row lacks the key."""
    return {key: _plain(value) for key, value in row.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_nulls(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _plain(value.tolist())
    return value
