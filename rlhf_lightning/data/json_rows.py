"""Reads JSON files: one object a line, a list of objects, or an object that holds the list; indented or not."""

from __future__ import annotations

import codecs
import json
import re
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any

from rlhf_lightning.data.files import ROW, Numbered, RawRow, kind_of, not_utf8, reading, shown, too_long, whole_file
from rlhf_lightning.errors import InputError

_BLANKS = re.compile(r"\s*")
_SKIPPING = json.JSONDecoder(parse_int=str)  # finds where a value ends; accepts repeated keys and huge numbers


def read_json(path: str, is_row: Callable[[RawRow], bool]) -> Iterator[Numbered]:
    """The rows of a JSON file with their numbers: line numbers if each line holds one object, else row numbers.

    Args:
        path: the file.
        is_row: tells whether the only object of a file is a row itself; else it holds the list of rows.
    """
    lines = path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    with reading(path) as file:
        first, more = _opening(file)
    if first.startswith(b"["):
        whole = True
    else:
        whole = first.startswith(b"{") and (_over_lines(path, first, more) if lines else not _one_a_line(first, more))
    if whole:
        yield from _values(path, whole_file(path), is_row)
    else:
        yield from _lines(path)


def _opening(file: IO[bytes]) -> tuple[bytes, bool]:
    """The first line that is not blank, stripped, and whether another one follows."""
    found = b""
    start = len(codecs.BOM_UTF8)
    while piece := file.readline(ROW):
        piece, start = piece[start:] if start and piece.startswith(codecs.BOM_UTF8) else piece, 0
        if not (piece := piece.strip()):
            continue
        if found:
            return found, True
        found = piece
    return found, False


def _one_a_line(first: bytes, more: bool) -> bool:
    """Whether the first line is a whole object, and other lines follow."""
    if not more:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return first.endswith(b"}")
    return True


def _over_lines(path: str, first: bytes, more: bool) -> bool:
    """Whether the first object spans several lines, as in an indented file."""
    if not more or first.endswith(b"}"):
        return False
    if first == b"{":
        return True
    try:
        with reading(path) as file:
            text = file.read(ROW).decode("utf-8-sig", "ignore").lstrip()
        _, end = _SKIPPING.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _values(path: str, data: bytes, is_row: Callable[[RawRow], bool]) -> Iterator[Numbered]:
    """Rows of a list, of an object that holds a list, or of objects one after the other."""
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, not_utf8(path, data.count(b"\n", 0, error.start) + 1, error, 0)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    place = _BLANKS.match(text).end()  # type: ignore[union-attr]
    inside = text.startswith("[", place)
    if not inside:
        yield from _held(path, text, decoder, is_row)
        return
    row, place = 0, place + 1
    while True:
        place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
        if text.startswith("]", place):
            if text[place + 1 :].strip():
                yield row, InputError(f"{path}:{row}: something follows the end of the list; write one list a file")
            return
        row += 1
        value, place = _decoded(path, text, place, row, decoder)
        yield row, value
        if place < 0:
            return
        place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
        if text.startswith(",", place):
            place += 1
        elif not text.startswith("]", place):
            at = f"line {text.count(chr(10), 0, place) + 1}"
            cut = "the file is cut off" if place >= len(text) else "a comma or ] is missing"
            yield row, InputError(f"{path}:{row}: not valid JSON after this row ({at}): {cut}; repair the file")
            return


def _held(path: str, text: str, decoder: Any, is_row: Callable[[RawRow], bool]) -> Iterator[Numbered]:
    """Rows of a file of objects. If there is only one object, it may be a row or hold the list of rows."""
    rows: list[Numbered] = []
    place = 0
    while place >= 0:
        place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
        if place == len(text):
            break
        value, place = _decoded(path, text, place, len(rows) + 1, decoder)
        rows.append((len(rows) + 1, value))
    if len(rows) == 1 and isinstance(rows[0][1], dict) and _by_columns(rows[0][1]):
        yield 1, InputError(f"{path}: a table by columns; write rows: DataFrame.to_json(path, orient='records')")
    elif len(rows) == 1 and isinstance(rows[0][1], dict) and not is_row(rows[0][1]):
        yield from _list_in(path, rows[0][1])
    else:
        yield from rows


def _list_in(path: str, held: RawRow) -> Iterator[Numbered]:
    lists = [key for key, value in held.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) > 1:
        names = ", ".join(map(shown, lists))
        yield 1, InputError(f"{path}: holds several lists of rows ({names}); write each to a file of its own")
    elif lists:
        others = ", ".join(shown(key) for key in held if key not in lists)
        if others:
            warnings.warn(f"{path}: the rows are under key '{shown(lists[0])}'; not read: {others}", stacklevel=2)
        for row, value in enumerate(held[lists[0]], 1):
            yield row, checked_row(value, f"{path}:{row}")
    else:
        yield 1, held


def _by_columns(held: RawRow) -> bool:
    """Whether an object is a table by columns: each value is an object by row number, or a list of cells of one length.

    Cells are no objects. So a row whose values are lists of messages is no such table, nor is an object that holds a
    list of rows.
    """
    values = list(held.values())
    if values and all(isinstance(value, dict) and "0" in value for value in values):
        return True
    if not all(isinstance(value, list) and value and not isinstance(value[0], dict) for value in values):
        return False
    surely = any(isinstance(value[0], str | list) for key, value in held.items() if key != "completions")
    return surely and len({len(value) for value in values}) == 1


def _decoded(path: str, text: str, place: int, row: int, decoder: Any) -> tuple[RawRow | InputError, int]:
    """One value and where it ends; -1 if the file cannot be read further."""
    where = f"{path}:{row}"
    try:
        value, end = decoder.raw_decode(text, place)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        cut = "the file is cut off or " if error.pos >= len(text.rstrip()) else ""
        return InputError(f"{where}: {cut}not valid JSON ({error.msg}, {at}); the rows after it are not read"), -1
    except RecursionError:
        return InputError(f"{where}: nested too deeply; the rows after it are not read"), -1
    except ValueError as error:  # a repeated key, or a number with thousands of digits: the row's end is known
        _, end = _SKIPPING.raw_decode(text, place)
        return InputError(f"{where}: {error}"), end
    return checked_row(value, where), end


def checked_row(value: Any, where: str) -> RawRow | InputError:
    """The value if it is an object, else the error."""
    if isinstance(value, dict):
        return value
    return InputError(f"{where}: a row must be a JSON object, not {kind_of(value)}; write one {{...}} for each")


def _lines(path: str) -> Iterator[Numbered]:
    start = line = 0
    with reading(path) as file:
        while piece := file.readline(ROW + 1):
            line += 1
            if len(piece) > ROW:
                yield line, too_long(path, line)
                return
            skipped = len(codecs.BOM_UTF8) if line == 1 and piece.startswith(codecs.BOM_UTF8) else 0
            if (row := piece[skipped:].removesuffix(b"\n")).strip():
                yield line, _parse_line(path, line, row, start + skipped, piece.endswith(b"\n"))
            start += len(piece)


def _parse_line(path: str, line: int, piece: bytes, start: int, complete: bool) -> RawRow | InputError:
    where = f"{path}:{line}"
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(path, line, error, start)
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        cut = "" if complete else "the last line is cut off or "
        return InputError(f"{where}: {cut}not valid JSON ({error.msg}, column {error.colno}); write one object a line")
    except (ValueError, RecursionError) as error:  # a repeated key, a huge number, or deep nesting
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return InputError(f"{where}: {problem}")
    if not isinstance(row, dict):
        return InputError(f"{where}: a row must be a JSON object, not {kind_of(row)}; write one {{...}} a line")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> RawRow:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key '{shown(twice)}': stands twice in one object; keep one of them")
    return row
