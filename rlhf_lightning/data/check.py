"""``python -m rlhf_lightning data check FILE...``: what is in preference files, and what is wrong with them.

Light by intent: neither torch nor lightning is imported, and transformers with ``--tokenizer`` alone.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.data.advice import advice
from rlhf_lightning.data.columns import Columns, columns_of
from rlhf_lightning.data.forms import FORMS
from rlhf_lightning.data.records import checked_rows
from rlhf_lightning.data.refusals import ACCEPTED, Refusals
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.spelling import LOOKS_SPECIAL, count_spelled
from rlhf_lightning.data.values import Response
from rlhf_lightning.errors import CommandParser, InputError
from rlhf_lightning.outputs import check_output, write_whole
from rlhf_lightning.text import printable

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 20  # causes that are listed before the rest is only counted
_TOKENS = 3  # special tokens named of those that a file spells
_COLUMNS = 3  # files side by side in one table
Measure = Callable[[list[str]], list[int]]


@dataclass
class Lengths:
    """How long texts are, in the report's unit."""

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
    advice: list[str] = field(default_factory=list)  # what to look at, though it can be read
    prompts: int = 0  # distinct
    pairs: int = 0
    desirable: int = 0  # labelled responses that are
    duplicates: int = 0  # rows that repeat an earlier one
    contradictory: int = 0  # pairs that stand in the file in both directions
    prompt_lengths: Lengths | None = None
    response_lengths: Lengths | None = None
    longer_wins: float | None = None  # share of the pairs in which the longer response is preferred, ties count half
    equally_long: int = 0  # pairs of responses of the same length
    spelling_rows: int = 0  # whose texts spell special tokens
    spelled: dict[str, int] = field(default_factory=dict)  # such tokens, by the rows that spell them
    merging: int | None = None  # borders of prompts and responses where tokens would merge; with a tokenizer
    borders: int = 0  # looked at for that
    noted: dict[str, int] = field(default_factory=dict)  # what the chat template makes of rows; with a tokenizer


@dataclass
class Report:
    """What all files hold, and the prompts that two of them share."""

    unit: str  # of the lengths: characters or tokens
    files: list[FileReport]
    leaks: list[dict[str, Any]]  # {"files": [a, b], "prompts": n}

    @property
    def refused(self) -> int:
        return sum(len(file.refused) for file in self.files)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the files, prints what they hold, and returns 0, or 2 where a row was refused."""
    parser = CommandParser(
        prog="python -m rlhf_lightning data check",
        description="What is in preference files, and what is wrong with them. Exit code 2 where a row is refused.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json, .csv or .parquet, or a hub name")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="names that rows have for keys: prompt=question",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="count lengths in this tokenizer's tokens, not characters")
    parser.add_argument("--json", metavar="FILE", help="write the report there too, refused rows in full")
    options = parser.parse_args(argv)
    if options.json:
        check_output(options.json, "--json", options.files)
    report = check(options.files, options.tokenizer, columns_of(options.columns))
    if options.json:
        write_whole(options.json, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    render(report)
    return 2 if report.refused else 0


def check(paths: Sequence[str], tokenizer: str | None = None, columns: Mapping[str, str] | None = None) -> Report:
    """Reads every file to its end; refused rows are collected, not raised.

    Args:
        paths: the files.
        tokenizer: a tokenizer's folder, to count lengths in tokens.
        columns: for keys of ours, the names that the rows have for them.

    Raises:
        InputError: a column that no row has.
    """
    measure = _token_counts(tokenizer) if tokenizer else _character_counts
    files, prompts = [], []
    names = Columns(columns, option="--columns")
    for path in dict.fromkeys(paths):
        report, keys = _check_file(path, measure, names, tokenizer)
        files.append(report)
        prompts.append(keys)
    names.check()
    leaks = [
        {"files": [files[a].path, files[b].path], "prompts": len(prompts[a] & prompts[b])}
        for a, b in combinations(range(len(files)), 2)
        if prompts[a] & prompts[b]
    ]
    return Report("tokens" if tokenizer else "characters", files, leaks)


def _check_file(path: str, measure: Measure, names: Columns, tokenizer: str | None) -> tuple[FileReport, set[str]]:
    report = FileReport(path)
    dropped: Counter[str] = Counter()
    records: list[Record] = []
    with warnings.catch_warnings(record=True) as told:  # Python would print them with a place in this package
        warnings.simplefilter("always")
        try:
            for item in checked_rows(path, dropped, columns=names):
                report.rows += 1
                if isinstance(item, InputError):
                    report.refused.append(str(item))
                elif item is not None:
                    records.append(item)
            if not report.rows:
                raise InputError(f"{path}: contains no rows; give a file with at least one")
        except InputError as error:  # the file as a whole
            report.refused.append(str(error))
    keys = [record.key for record in records]
    report.usable = len(records)
    report.dropped = dict(sorted(dropped.items()))
    report.forms = dict(Counter(str(record.form) for record in records).most_common())
    columns = {(record.form.labelled, name) for record in records for name in record.columns}
    report.columns = sorted({name for labelled, name in columns if not (labelled and name == "label")})
    report.advice = [str(line.message).removeprefix(f"{path}: ") for line in told] + advice(records, names.option)
    report.prompts = len(set(keys))
    labels = [record.desirable if record.form.labelled else None for record in records]
    report.desirable = labels.count(True)
    rows = [(record.identity, record.responses, record.pairs) for record in records]
    report.duplicates = len(rows) - len(set(rows))
    report.prompt_lengths = _lengths(measure([_whole(record) for record in records]))
    report.response_lengths = _lengths(measure([_words(text) for record in records for text in record.responses]))
    pairs = [
        (key, _words(record.responses[better]), _words(record.responses[worse]))
        for key, record in zip(keys, records, strict=True)
        for better, worse in record.pairs
    ]
    report.pairs = len(pairs)
    distinct = set(pairs)
    report.contradictory = sum((key, worse, better) in distinct for key, better, worse in distinct) // 2
    _compare_lengths(report, pairs, measure)
    _check_tokens(report, records, tokenizer)
    return report, set(keys)


def _check_tokens(report: FileReport, records: list[Record], folder: str | None) -> None:
    if folder is None or not records:
        tokens, report.spelling_rows = count_spelled(records, LOOKS_SPECIAL)
    else:
        from rlhf_lightning.data.borders import rendered_rows
        from rlhf_lightning.models.loading import load_tokenizer

        encoder, refused = rendered_rows(load_tokenizer(folder), records)
        tokens, report.spelling_rows = encoder.spelled_in(records)
        report.merging, report.borders = encoder.borders["merged"], encoder.borders["compared"]
        report.refused += refused
        report.noted = dict(encoder.noted)
        report.advice += encoder.conversations.losses if encoder.conversations is not None else []
    report.spelled = dict(tokens.most_common())


def _compare_lengths(report: FileReport, pairs: list[tuple[str, str, str]], measure: Measure) -> None:
    if not pairs:
        return
    better = measure([pair[1] for pair in pairs])
    worse = measure([pair[2] for pair in pairs])
    report.equally_long = sum(a == b for a, b in zip(better, worse, strict=True))
    longer = sum(a > b for a, b in zip(better, worse, strict=True))
    report.longer_wins = (longer + 0.5 * report.equally_long) / len(pairs)


def _whole(record: Record) -> str:
    if isinstance(record.prompt, str):
        return record.prompt
    return "\n".join(message.content for message in record.prompt)


def _words(response: Response) -> str:
    return response if isinstance(response, str) else "\n".join(message.content for message in response)


def _character_counts(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def _token_counts(folder: str) -> Measure:
    from rlhf_lightning.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    known: dict[str, int] = {}

    def counts(texts: list[str]) -> list[int]:
        new = list({text for text in texts if text not in known})
        if new:
            ids = tokenizer(new, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            known.update(zip(new, map(len, ids), strict=True))
        return [known[text] for text in texts]

    return counts


def _lengths(values: list[int]) -> Lengths | None:
    if not values:
        return None
    values = sorted(values)
    return Lengths(values[len(values) // 2], values[min(len(values) - 1, int(0.95 * len(values)))], values[-1])


def render(report: Report, console: Console | None = None) -> None:
    """Prints the report: a table with a column a file, then leaks and refused rows."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    read = [file for file in report.files if file.rows]
    for start in range(0, len(read), _COLUMNS):
        files = read[start : start + _COLUMNS]
        table = Table(header_style="bold", box=None, padding=(0, 3, 0, 0))
        table.add_column("", no_wrap=True)
        for file in files:
            table.add_column(_plain(Path(file.path).name), justify="right", overflow="fold")
        for label, cells in _table_rows(files, report.unit):
            table.add_row(_plain(label), *map(_plain, cells))
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
            console.print(f"[yellow]{_plain(f'{Path(file.path).name}: {what}: {count:,}')}[/yellow]", soft_wrap=True)
    _render_refused(report, console)


def _plain(text: str) -> str:
    """Text of files as it stands: no markup to rich, and nothing that steers a terminal."""
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
    else:
        console.print("[green]no row is refused[/green]")


def _table_rows(files: list[FileReport], unit: str) -> list[tuple[str, list[str]]]:
    """Label and one cell a file; rows that say nothing of any file are left out."""
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
