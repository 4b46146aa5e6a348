"""Prints lines for users, makes text of models and data files safe to print, and finds the nearest known name."""

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

_INDENT = 10  # column of the text after a heading
_TO_COPY = ("curves", "next")  # headings of commands, which stay on one line so that users can copy them
PACKAGE = Path(__file__).resolve().parent
_T = TypeVar("_T")


def printable(text: str) -> str:
    """Text without control characters (a model may emit terminal escapes), except line breaks and tabs.

    A lone surrogate, as in a file name that is not UTF-8, cannot be printed and becomes a question mark.
    """
    allowed = (c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join("?" if unicodedata.category(c) == "Cs" else c for c in allowed)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is spelt most like ``name``; None if no similarity reaches ``cutoff``, between 0 and 1."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def alike(path: Path, kind: Callable[[Path], bool]) -> str:
    """`` (did you mean X?)`` with the path of the same folder and kind that is spelt most like a missing one."""
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir() if kind(entry)) if folder.is_dir() else []
    meant = nearest(path.name, names)
    return f" (did you mean {folder / meant}?)" if meant else ""


def counted(items: Sequence[_T], what: str, every: float = 10.0) -> Iterator[_T]:
    """Yields the items. Every so many seconds the first process prints how many are done."""
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
    printed = time.monotonic()
    for done, item in enumerate(items):
        if first and time.monotonic() - printed >= every:
            printed = time.monotonic()
            say(f"{what}: {done:,} of {len(items):,}")
        yield item


def notice(name: str, text: str) -> str:
    """A line with a heading and a text. In a terminal, long lines are broken between words, except commands."""
    line = f"{name:<{_INDENT}}{text}"
    if name in _TO_COPY or not sys.stdout.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False, "replace_whitespace": False}
    return textwrap.fill(line, width, subsequent_indent=" " * _INDENT, **options)


def plain_warnings() -> None:
    """Makes this library's warnings appear as a `notice`, without the line of code that they come from.

    Lightning sets the same hook when it is imported, so this must be called after that.
    """
    warnings.formatwarning = _plain_warning


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    ours = Path(filename).is_relative_to(PACKAGE)
    return f"{notice('warning', str(message))}\n" if ours else f"{filename}:{lineno}: {message}\n"


def say(line: str, stream: TextIO | None = None) -> bool:
    """Prints a line at once, and returns whether that worked. A closed or full stream must not end a run.

    Args:
        line: the line; characters that the stream's encoding lacks are escaped.
        stream: the stream, by default stdout.
    """
    stream = stream or sys.stdout
    try:
        try:
            print(line, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        # Nobody reads the stream any more. Its pending text would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    except (OSError, ValueError):
        return False
    return True
