"""The report of ``data check``: its numbers, and how they are printed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.forms import FORMS
from rlhf_lightning.data.refusals import ACCEPTED, Refusals
from rlhf_lightning.data.summary import counts_text
from rlhf_lightning.text import printable

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 20  # causes that are listed before the rest is only counted
_TOKENS = 3  # most special tokens that are named of those that a file spells
_FILES = 3  # most files side by side in one table
_LABEL = 34  # characters of a label before it goes on in a new line
_GAP = 3  # spaces between two columns


@dataclass
class Lengths:
    """The lengths of texts, in the report's unit."""

    median: int
    p95: int
    longest: int


@dataclass
class FileReport:
    """What one file holds."""

    path: str
    rows: int = 0  # read, refused and dropped ones included
    usable: int = 0
    refused: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # rows or pairs, by reason
    forms: dict[str, int] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)  # keys that are handed on to reward functions
    advice: list[str] = field(default_factory=list)  # things to look at in rows that can be read
    prompts: int = 0  # distinct
    pairs: int = 0
    desirable: int = 0  # responses with label true
    duplicates: int = 0  # rows that repeat an earlier one
    contradictory: int = 0  # pairs that stand in the file in both directions
    prompt_lengths: Lengths | None = None
    response_lengths: Lengths | None = None
    longer_wins: float | None = None  # share of the pairs in which the longer response is preferred, ties count half
    equally_long: int = 0  # pairs of responses of the same length
    spelling_rows: int = 0  # rows whose texts spell special tokens
    spelled: dict[str, int] = field(default_factory=dict)  # for each such token, the number of rows that spell it
    merging: int | None = None  # borders of prompt and response where tokens would merge; None without a tokenizer
    borders: int = 0  # borders that were checked for `merging`
    noted: dict[str, int] = field(default_factory=dict)  # rows with something unexpected, by what it is


@dataclass
class Report:
    """The reports of all files, and the prompts that two files share."""

    unit: str  # of the lengths: characters or tokens
    files: list[FileReport]
    leaks: list[dict[str, Any]]  # {"files": [a, b], "prompts": n}

    @property
    def refused(self) -> int:
        return sum(len(file.refused) for file in self.files)

    @property
    def spent(self) -> list[FileReport]:
        """The files of which all rows were dropped."""
        return [file for file in self.files if file.rows and not file.usable and not file.refused]


def render(report: Report, console: Console | None = None) -> None:
    """Prints the report: a table with one column for each file, then leaks, advice and refused rows."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    for files in _side_by_side([file for file in report.files if file.rows], report.unit, console.width):
        table = Table(header_style="bold", box=None, padding=(0, _GAP, 0, 0))
        table.add_column("", no_wrap=True)
        for file in files:
            table.add_column(_plain(Path(file.path).name), justify="right", overflow="fold")
        for label, cells in _table_rows(files, report.unit):
            table.add_row(_plain(_broken(label)), *map(_plain, cells))
        console.print()
        console.print(table)
    console.print()
    for file in report.files:
        if file.spelling_rows:
            tokens = ", ".join(json.dumps(token, ensure_ascii=False) for token in list(file.spelled)[:_TOKENS])
            kind = "special tokens" if report.unit == "tokens" else "what looks like special tokens"
            text = (
                f"{file.path}: {file.spelling_rows:,} rows spell {kind} ({tokens}), which stay text in training; where "
                "a chat template was applied already, set data.special_tokens to tokens, or give rows of messages"
            )
            console.print(f"[yellow]{_plain(text)}[/yellow]", soft_wrap=True)
    for leak in report.leaks:
        first, second = leak["files"]
        text = f"prompt leak: {leak['prompts']:,} prompts stand in both {first} and {second}"
        console.print(f"[yellow]{_plain(text)}[/yellow]", soft_wrap=True)
    for file in report.files:
        for line in file.advice:
            console.print(f"[yellow]look at[/yellow] {_plain(f'{Path(file.path).name}: {line}')}", soft_wrap=True)
        for what, count in sorted(file.noted.items()):
            console.print(
                f"[yellow]noted[/yellow] {_plain(f'{Path(file.path).name}: {what}: {count:,}')}", soft_wrap=True
            )
    _render_refused(report, console)


def _side_by_side(files: Sequence[FileReport], unit: str, width: int) -> Iterator[list[FileReport]]:
    """Groups the files so that each group's table fits into the terminal, if a single file's table does."""
    group: list[FileReport] = []
    for file in files:
        more = [*group, file]
        if group and (len(more) > _FILES or _table_width(more, unit) > width):
            yield group
            more = [file]
        group = more
    if group:
        yield group


def _table_width(files: list[FileReport], unit: str) -> int:
    rows = _table_rows(files, unit)
    labels = max((len(line) for label, _ in rows for line in _broken(label).splitlines()), default=0)
    columns = zip(*(cells for _, cells in rows), strict=True)
    widths = [max(len(line) for cell in column for line in [*cell.splitlines(), ""]) for column in columns]
    names = [len(printable(Path(file.path).name)) for file in files]
    return labels + sum(max(sizes) + _GAP for sizes in zip(widths, names, strict=True)) + _GAP


def _broken(label: str) -> str:
    """The label in lines that leave room for the numbers. Later lines are indented further."""
    inside = " " * (len(label) - len(label.lstrip()) + 2)
    return textwrap.fill(label, _LABEL, subsequent_indent=inside)


def _plain(text: str) -> str:
    """Text of a file, safe to print: rich finds no markup in it, and it cannot control the terminal."""
    from rich.markup import escape

    return escape(printable(text))


def _render_refused(report: Report, console: Console) -> None:
    refused = [message for file in report.files for message in file.refused]
    refusals = Refusals()
    for message in refused:
        refusals.add(message)
    causes = refusals.causes()
    for message, count in causes[:_SHOWN]:
        rows = f"{count:,} rows, the first: " if count > 1 else ""
        console.print(f"[red]refused[/red] {rows}{_plain(message.partition(ACCEPTED)[0])}", soft_wrap=True)
    if len(causes) > _SHOWN:
        console.print(f"[red]refused[/red] for {len(causes) - _SHOWN:,} more causes; --json FILE lists every row")
    if any(ACCEPTED in message for message in refused):
        console.print("accepted forms of a row:")
        for form in FORMS:
            console.print(f"  {_plain(form.keys)}", soft_wrap=True)
    if refused:
        console.print(f"[red]{len(refused):,} refused[/red]: training would stop at the first")
    elif not report.spent:
        console.print("[green]no row is refused[/green]")
    for file in report.spent:
        reasons = counts_text(file.dropped, {})
        text = f"{Path(file.path).name}: no row is left to train on of {file.rows:,} read ({reasons})"
        console.print(f"[red]{_plain(text)}[/red]", soft_wrap=True)


def _table_rows(files: list[FileReport], unit: str) -> list[tuple[str, list[str]]]:
    """The table's rows: a label, and one cell for each file. Rows that are empty for all files are left out."""
    rows: list[tuple[str, list[str]]] = [
        ("rows", [f"{file.rows:,}" for file in files]),
        ("  refused", [f"{len(file.refused):,}" for file in files]),
    ]
    for reason in sorted({reason for file in files for reason in file.dropped} - {"ties"}):
        rows.append((f"  dropped: {reason}", [f"{file.dropped.get(reason, 0):,}" for file in files]))
    rows += [
        ("  repeated", [f"{file.duplicates:,}" for file in files]),
        ("form", ["\n".join(f"{form} {n:,}" for form, n in file.forms.items()) for file in files]),
        ("other columns", ["\n".join(file.columns) for file in files]),
        ("labelled desirable", [f"{f.desirable:,}" if "labelled" in f.forms else "" for f in files]),
        ("distinct prompts", [f"{file.prompts:,}" for file in files]),
        ("pairs", [_of_pairs(file, file.pairs) for file in files]),
        ("  ties left out", [_of_pairs(file, file.dropped.get("ties", 0)) for file in files]),
        ("  in both directions", [_of_pairs(file, file.contradictory) for file in files]),
        ("  longer response wins", ["" if f.longer_wins is None else f"{f.longer_wins:.1%}" for f in files]),
        ("    of equal length (half)", [_of_pairs(file, file.equally_long) for file in files]),
        ("borders that merge", [_merging(file) for file in files]),
    ]
    for what, lengths in (
        ("prompt", [file.prompt_lengths for file in files]),
        ("response", [file.response_lengths for file in files]),
    ):
        rows.append((f"{what} {unit}, median", [f"{item.median:,}" if item else "" for item in lengths]))
        rows.append(("  95% are at most", [f"{item.p95:,}" if item else "" for item in lengths]))
        rows.append(("  longest", [f"{item.longest:,}" if item else "" for item in lengths]))
    return [(label, cells) for label, cells in rows if any(cells)]


def _merging(file: FileReport) -> str:
    return "" if file.merging is None else f"{file.merging:,} of {file.borders:,}"


def _of_pairs(file: FileReport, number: int) -> str:
    return f"{number:,}" if file.pairs or file.dropped.get("ties") else ""
