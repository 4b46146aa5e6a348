"""Text of others (models, data files) made fit to be shown, and shown; and the name that was likely meant."""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

_INDENT = 10  # of what stands behind a heading
_TO_COPY = ("curves", "next")  # commands, in one piece
PACKAGE = Path(__file__).resolve().parent
_T = TypeVar("_T")


def printable(text: str) -> str:
    """Text without control characters (a model may emit terminal escapes), line breaks and tabs kept.

    A lone surrogate, as in the name of a file that is no UTF-8, can not be printed and becomes a question mark.
    """
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join("?" if unicodedata.category(c) == "Cs" else c for c in kept)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is spelt most like ``name``, or None where none is alike by ``cutoff`` of 1."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def alike(path: Path, kind: Callable[[Path], bool]) -> str:
    """`` (did you mean X?)`` for what lies beside a missing path, is of its kind, and is spelt most like it."""
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir() if kind(entry)) if folder.is_dir() else []
    meant = nearest(path.name, names)
    return f" (did you mean {folder / meant}?)" if meant else ""


def counted(items: Sequence[_T], what: str, every: float = 10.0) -> Iterator[_T]:
    """The items; where they take long, the first process says every so many seconds how many are done."""
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    told = time.monotonic()
    for done, item in enumerate(items):
        if first and time.monotonic() - told >= every:
            told = time.monotonic()
            say(f"{what}: {done:,} of {len(items):,}")
        yield item


def notice(name: str, text: str) -> str:
    """A line of a heading and a text; in a terminal it is broken between words, but for commands."""
    line = f"{name:<{_INDENT}}{text}"
    if name in _TO_COPY or not sys.stdout.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False, "replace_whitespace": False}
    return textwrap.fill(line, width, subsequent_indent=" " * _INDENT, **options)


def plain_warnings() -> None:
    """From here on a warning of this library's is a `notice`: where in the code it was said helps nobody.

    Lightning sets the same hook where it is imported, so this comes after.
    """
    warnings.formatwarning = _plain_warning


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    own = Path(filename).is_relative_to(PACKAGE)
    return f"{notice('warning', str(message))}\n" if own else f"{filename}:{lineno}: {message}\n"


def say(line: str, stream: TextIO | None = None) -> bool:
    """Print a line at once; whether that worked. A stream that is closed, full or narrow is no reason to end a run.

    Args:
        line: what the stream's encoding has no character for is escaped.
        stream: by default stdout.
    """
    stream = stream or sys.stdout
    try:
        try:
            print(line, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        # Nobody reads it any more; what is pending in it would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    except (OSError, ValueError):
        return False
    return True
