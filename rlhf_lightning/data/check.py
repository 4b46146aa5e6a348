"""``python -m rlhf_lightning data check FILE...``: reports what preference files hold, and what is wrong with them.

The command starts fast: it imports neither torch nor lightning, and transformers only with ``--tokenizer``.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations

from rlhf_lightning.data.advice import advice
from rlhf_lightning.data.columns import Columns, columns_of
from rlhf_lightning.data.records import checked_rows
from rlhf_lightning.data.report import FileReport, Lengths, Report, render
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.spelling import LOOKS_SPECIAL, count_spelled
from rlhf_lightning.data.values import Response
from rlhf_lightning.errors import CommandParser, InputError
from rlhf_lightning.outputs import check_output, write_whole

Measure = Callable[[list[str]], list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the files and prints the report. Returns 2 if a row was refused or a file has no row left, else 0."""
    parser = CommandParser(
        prog="python -m rlhf_lightning data check",
        description="Reports what preference files hold, and what is wrong with them. The exit code is 2 if a row is "
        "refused, or if a file has no row left to train on.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json, .csv or .parquet, or a hub name")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="our name of a key, and the name that your rows have for it: prompt=question",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="count lengths in this tokenizer's tokens, not characters")
    parser.add_argument("--json", metavar="FILE", help="also write the report to this file, with every refused row")
    options = parser.parse_args(argv)
    if options.json:
        check_output(options.json, "--json", options.files)
    report = check(options.files, options.tokenizer, columns_of(options.columns))
    if options.json:
        write_whole(options.json, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    render(report)
    return 2 if report.refused or report.spent else 0


def check(paths: Sequence[str], tokenizer: str | None = None, columns: Mapping[str, str] | None = None) -> Report:
    """Reads every file to its end; refused rows are collected, not raised.

    Args:
        paths: the files.
        tokenizer: a tokenizer's folder, to count lengths in tokens.
        columns: maps our names of keys to the names that the rows have for them.

    Raises:
        InputError: no row has one of these columns.
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
    noted: Counter[str] = Counter()
    records: list[Record] = []
    with warnings.catch_warnings(record=True) as caught:  # Python would print them with a line of this package
        warnings.simplefilter("always")
        try:
            for item in checked_rows(path, dropped, columns=names, noted=noted):
                report.rows += 1
                if isinstance(item, InputError):
                    report.refused.append(str(item))
                elif item is not None:
                    records.append(item)
            if not report.rows:
                raise InputError(f"{path}: contains no rows; give a file with at least one")
        except InputError as error:  # about the file as a whole
            report.refused.append(str(error))
    keys = [record.key for record in records]
    report.usable = len(records)
    report.dropped = dict(sorted(dropped.items()))
    report.noted = dict(noted)
    report.forms = dict(Counter(str(record.form) for record in records).most_common())
    columns = {(record.form.labelled, name) for record in records for name in record.columns}
    report.columns = sorted({name for labelled, name in columns if not (labelled and name == "label")})
    report.advice = [str(line.message).removeprefix(f"{path}: ") for line in caught] + advice(records, names.option)
    report.prompts = len(set(keys))
    labels = [record.desirable if record.form.labelled else None for record in records]
    report.desirable = labels.count(True)
    rows = [(record.identity, record.responses, record.pairs) for record in records]
    report.duplicates = len(rows) - len(set(rows))
    report.prompt_lengths = _lengths(measure([_prompt_text(record) for record in records]))
    responses = [_response_text(response) for record in records for response in record.responses]
    report.response_lengths = _lengths(measure(responses))
    pairs = [
        (key, _response_text(record.responses[better]), _response_text(record.responses[worse]))
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
        report.noted |= encoder.noted
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


def _prompt_text(record: Record) -> str:
    if isinstance(record.prompt, str):
        return record.prompt
    return "\n".join(message.content for message in record.prompt)


def _response_text(response: Response) -> str:
    return response if isinstance(response, str) else "\n".join(message.content for message in response)


def _character_counts(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def _token_counts(folder: str) -> Measure:
    from rlhf_lightning.data.ids import AT_ONCE
    from rlhf_lightning.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    known: dict[str, int] = {}

    def counts(texts: list[str]) -> list[int]:
        new = list({text for text in texts if text not in known})
        for start in range(0, len(new), AT_ONCE):
            block = new[start : start + AT_ONCE]
            ids = tokenizer(block, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            known.update(zip(block, map(len, ids), strict=True))
        return [known[text] for text in texts]

    return counts


def _lengths(values: list[int]) -> Lengths | None:
    if not values:
        return None
    values = sorted(values)
    return Lengths(values[len(values) // 2], values[min(len(values) - 1, int(0.95 * len(values)))], values[-1])
