"""Helpers of all file readers: a file's bytes, and the names of keys and values in messages."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError
from rlhf_lightning.text import alike

RawRow = dict[str, Any]
Numbered = tuple[int, RawRow | InputError]


def whole_file(path: str) -> bytes:
    """The whole file, decompressed."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        hint = alike(Path(path), Path.is_file) if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{path}: cannot be read ({error.strerror}){hint}; check the path") from None
    if not path.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except EOFError:
        raise InputError(f"{path}: the gzip data is cut off; copy or write the file again") from None
    except (OSError, zlib.error) as error:
        raise InputError(f"{path}: not valid gzip data ({error}); compress it again, or drop the .gz") from None


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
