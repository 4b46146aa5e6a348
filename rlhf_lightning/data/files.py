"""Helpers of all file readers: a file's bytes and their limits, and the names of keys and values in messages."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf_lightning.errors import InputError
from rlhf_lightning.text import alike

RawRow = dict[str, Any]
Numbered = tuple[int, RawRow | InputError]

ROW = 64 << 20  # bytes that a line of JSON, or a line or cell of CSV, may have
WHOLE = 1 << 30  # bytes of a JSON file that holds all rows in one value, and of 64 rows of Parquet
# A compressed file may hold this many times its size, or SMALL bytes if that is more. Text has 3 to 20 times, and
# somewhat over 100 where every row repeats a long system message.
GROWTH, SMALL = 200, 1 << 30


class _Inflated(io.RawIOBase):
    """The decompressed bytes of a gzip file, up to a limit.

    Args:
        path: for the message.
        limit: the bytes that it may hold.
    """

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._left = path, limit
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise InputError(
                f"{self._path}: the gzip data holds more than {GROWTH} times its size, far more than text does; look "
                "what it is, and decompress it first if it is right"
            )
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def most_held(path: str) -> int:
    """The bytes that a file may hold, decompressed."""
    return max(SMALL, GROWTH * os.stat(path).st_size)


@contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """Opens a file to read it in pieces, decompressed.

    Raises:
        InputError: the file cannot be read, or is damaged; also for what the body meets while it reads.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: is no file but a device or a pipe; write the rows to a file")
        if path.lower().endswith(".gz"):
            with io.BufferedReader(_Inflated(path, most_held(path)), 1 << 20) as file:
                yield file
        else:
            with open(path, "rb", buffering=1 << 20) as file:
                yield file
    except EOFError:
        raise InputError(f"{path}: the gzip data is cut off; copy or write the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not valid gzip data ({error}); compress it again, or drop the .gz") from None
    except OSError as error:
        hint = alike(Path(path), Path.is_file) if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{path}: cannot be read ({error.strerror}){hint}; check the path") from None


def whole_file(path: str) -> bytes:
    """The whole file, decompressed. Only JSON that is one value for many rows is read so."""
    with reading(path) as file:
        data = file.read(WHOLE + 1)
    if len(data) > WHOLE:
        size = f"{WHOLE / (1 << 30):g} GiB"
        raise InputError(f"{path}: one JSON value with more than {size}; write one object a line (.jsonl)")
    return data


def too_long(path: str, line: int) -> InputError:
    """The error for a row beyond the limit."""
    return InputError(f"{path}:{line}: a row of more than {ROW >> 20} MiB; the rows after it are not read")


def not_utf8(path: str, line: int, error: UnicodeDecodeError, start: int) -> InputError:
    """The error that names the byte at fault. ``start`` is the byte of the file at which the decoded piece begins."""
    return InputError(
        f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte {start + error.start} of the file; "
        "save the file as UTF-8"
    )


def shown(key: str) -> str:
    """A user's key in a form that fits into a one-line message."""
    return key if key.isprintable() else ascii(key)[1:-1]


def kind_of(value: Any) -> str:
    """The name of a JSON value's type in messages."""
    kinds = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def faulty_text(value: Any) -> str:
    """The fault of a text inside a value: a NUL character, or half of a surrogate pair. Empty if there is none."""
    if isinstance(value, str):
        if "\0" in value:
            return "holds a NUL character"
        return "" if value.isascii() or _encodable(value) else "holds half of a surrogate pair"
    inner: Any = ()
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list):
        inner = value
    return next((fault for item in inner if (fault := faulty_text(item))), "")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
