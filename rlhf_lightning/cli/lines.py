"""How a line of a heading and a text looks, warnings among them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

from rlhf_lightning.cli.configs import PACKAGE
from rlhf_lightning.text import say

INDENT = 10
_TO_COPY = ("curves", "next")  # commands, in one piece


def notice(name: str, text: str) -> str:
    """A line of what is said before and after a run; in a terminal it is broken between words, but for commands."""
    line = f"{name:<{INDENT}}{text}"
    if name in _TO_COPY or not sys.stdout.isatty():
        return line
    width = max(40, shutil.get_terminal_size().columns)
    options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False, "replace_whitespace": False}
    return textwrap.fill(line, width, subsequent_indent=" " * INDENT, **options)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """For ``warnings.showwarning``: one of this library's names what it is about; where it was said helps nobody.

    ``warnings.formatwarning`` would be the smaller hook, and Lightning takes that one for itself.
    """
    own = Path(filename).is_relative_to(PACKAGE)
    say(notice("warning", str(message)) if own else f"{filename}:{lineno}: {message}", file or sys.stderr)
