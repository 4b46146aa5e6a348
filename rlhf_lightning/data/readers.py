"""File formats: JSONL, JSONL.gz, CSV, Parquet and hub data sets, each to numbered rows of plain Python values.

A reader yields ``(line, row)`` where ``row`` is a dict, or the ``InputError`` that says what is wrong with that line,
so that a caller may stop at the first one (training) or list them all (``data check``). Lines are counted from 1;
Parquet and hub rows count as lines.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError

RawRow = dict[str, Any]
Numbered = tuple[int, RawRow | InputError]

_JSONL = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_LIST_CELLS = ("completions", "ranks", "ratings", "messages")
_NUMBER_CELLS = ("margin", "weight")


def read_rows(path: str) -> Iterator[Numbered]:
    """The rows of one source: a file by its suffix, else a hub data set ``owner/name`` or ``owner/name:split``.

    Raises:
        InputError: no such file, an unknown suffix, an unreadable file, or a missing optional package.
    """
    name = path.lower()
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; name the data files in it")
    if name.endswith(_JSONL):
        return _read_jsonl(path)
    if name.endswith(".csv"):
        return _read_csv(path)
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if Path(path).exists():
        raise InputError(f"{path}: unknown kind of file; use .jsonl, .jsonl.gz, .csv or .parquet")
    if _HUB_NAME.fullmatch(path):
        return _read_hub(path)
    raise InputError(f"{path}: no such file; give a .jsonl, .jsonl.gz, .csv or .parquet file, or a hub data set's name")


def _bytes(path: str) -> bytes:
    """The whole file, decompressed."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not path.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except EOFError:
        raise InputError(f"{path}: the gzip data is cut off; copy or write the file again") from None
    except (OSError, zlib.error) as error:
        raise InputError(f"{path}: not valid gzip data ({error}); compress it again, or drop the .gz") from None


def _not_utf8(path: str, line: int, error: UnicodeDecodeError, start: int) -> InputError:
    return InputError(
        f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte {start + error.start} of the file; "
        "save the file as UTF-8"
    )


def _read_jsonl(path: str) -> Iterator[Numbered]:
    data = _bytes(path)
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    line = 0
    while start < len(data):
        line += 1
        end = data.find(b"\n", start)
        complete = end >= 0
        piece = data[start : end if complete else len(data)]
        if piece.strip():
            yield line, _parse_line(path, line, piece, start, complete)
        start += len(piece) + 1


def _parse_line(path: str, line: int, piece: bytes, start: int, complete: bool) -> RawRow | InputError:
    where = f"{path}:{line}"
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(path, line, error, start)
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        cut = "" if complete else "the last line is cut off or "
        return InputError(f"{where}: {cut}not valid JSON ({error.msg}, column {error.colno}); write one object a line")
    except (ValueError, RecursionError) as error:  # a repeated key, a number with thousands of digits, deep nesting
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return InputError(f"{where}: {problem}")
    if not isinstance(row, dict):
        return InputError(f"{where}: a row must be a JSON object, not {kind_of(row)}; write one {{...}} a line")
    if _SURROGATE_ESCAPE.search(text):
        for key, value in row.items():
            try:
                json.dumps([key, value], ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                return InputError(f"{where}: key '{shown(key)}': holds half of a surrogate pair; repair the text")
            except RecursionError:
                return InputError(f"{where}: nested too deeply")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> RawRow:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{shown(twice)}': stands twice in one object; keep one of them")
    return row


def shown(key: str) -> str:
    """A key of the user's as it stands in a one-line message."""
    return key if key.isprintable() else ascii(key)[1:-1]


def kind_of(value: Any) -> str:
    """What a JSON value is called in a message."""
    kinds = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _read_csv(path: str) -> Iterator[Numbered]:
    data = _bytes(path)
    skipped = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: skipped + error.start].count(b"\n") + 1
        raise _not_utf8(path, line, error, skipped) from None
    limit = csv.field_size_limit(sys.maxsize)  # the default, 128 KiB a cell, is short for a long transcript
    try:
        yield from list(_csv_rows(path, csv.reader(io.StringIO(text, newline=""), strict=True)))
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: str, reader: Any) -> Iterator[Numbered]:
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield line, InputError(f"{path}:{line}: not valid CSV ({error}); check the quotes")
            return
        if cells is None:
            return
        if not cells:  # a blank line
            pass
        elif header is None:
            header = cells
            for name in header:
                if header.count(name) > 1:
                    raise InputError(f"{path}:{line}: key '{shown(name)}': two columns have this name; rename one")
        elif len(cells) != len(header):
            message = f"{path}:{line}: {len(cells)} cells under {len(header)} column names; check commas and quotes"
            yield line, InputError(message)
        else:
            yield line, _csv_row(path, line, dict(zip(header, cells, strict=True)))
        line = reader.line_num + 1


def _csv_row(path: str, line: int, cells: dict[str, str]) -> RawRow | InputError:
    """CSV knows text only: lists stand as JSON in their cell, numbers as digits, a completion's label as true or false;
    an empty one means none is given."""
    row: RawRow = dict(cells)
    if "completion" in row and "label" in row:
        label = row.pop("label").strip()
        if label:
            row["label"] = {"true": True, "false": False}.get(label.lower(), label)
    for key in (*_LIST_CELLS, *_NUMBER_CELLS):
        if key not in row:
            continue
        if not row[key].strip():
            del row[key]
            continue
        try:
            row[key] = float(row[key]) if key in _NUMBER_CELLS else json.loads(row[key])
        except (ValueError, RecursionError):
            wanted = "a number" if key in _NUMBER_CELLS else "a JSON list"
            return InputError(f"{path}:{line}: key '{key}': the cell must hold {wanted}, got {_clip(row[key])}")
    return row


def _clip(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _read_parquet(path: str) -> Iterator[Numbered]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow; run: pip install 'rlhf-lightning[parquet]'") from None
    data = _bytes(path)
    try:
        batches = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).iter_batches()
        line = 0
        for batch in batches:
            for row in batch.to_pylist():
                line += 1
                yield line, _without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable Parquet file ({reason}); write it again") from None


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
    except Exception as error:  # network, missing name, missing split: the package raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: no such file, and the hub data set cannot be loaded ({reason})") from None
    for line, row in enumerate(rows, 1):
        yield line, _without_nulls(dict(row))


def _without_nulls(row: RawRow) -> RawRow:
    """Tables have every column in every row: there, null means that the row lacks the key."""
    return {key: value for key, value in row.items() if value is not None}
