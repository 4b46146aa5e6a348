"""How a line of a heading and a text looks, warnings among them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from rlhf_lightning.cli.configs import PACKAGE

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


def plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """For ``warnings.formatwarning``: one of this library's names what it is about; where it was said helps nobody."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"{notice('warning', str(message))}\n"
    return f"{filename}:{lineno}: {message}\n"
