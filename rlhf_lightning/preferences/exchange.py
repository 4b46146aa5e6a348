"""``python -m rlhf_lightning preferences export|import``: from a store to rows, and between forms of rows.

The forms: ``ours`` keeps every column; ``trl`` has prompt, chosen and rejected alone, as TRL's trainers read them;
``hh`` has two transcripts, as Anthropic's HH data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_lightning.data.messages import checked_prompt
from rlhf_lightning.data.records import load_records
from rlhf_lightning.data.rows import ASSISTANT, HUMAN, Record
from rlhf_lightning.data.values import Prompt, Response
from rlhf_lightning.errors import CommandParser, InputError, check_choice
from rlhf_lightning.outputs import check_output, write_whole
from rlhf_lightning.preferences.store import Store
from rlhf_lightning.preferences.votes import RowOut, Votes, export
from rlhf_lightning.text import notice, printable, say

Written = Literal["ours", "trl", "hh"]
_SPEAKERS = {"user": HUMAN, "assistant": ASSISTANT}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` begins with, ``export`` or ``import``.

    Returns 0; raises an InputError if options, store or files are at fault.
    """
    command, *options = sys.argv[1:] if argv is None else argv
    return _export(options) if command == "export" else _import(options)


def _export(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="python -m rlhf_lightning preferences export",
        description="Makes rows that fit reads of the judgements in a store. Each row has all of its votes.",
    )
    parser.add_argument("store", metavar="STORE", help="the file that annotate made")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows, one JSON object a line")
    parser.add_argument("--votes", required=True, choices=get_args(Votes), help="how several judgements become one row")
    parser.add_argument(
        "--min_votes", type=int, default=1, metavar="N", help="judgements that an item needs; default 1"
    )
    parser.add_argument(
        "--form", default="ours", choices=get_args(Written), help="ours keeps all columns; trl and hh do not"
    )
    options = parser.parse_args(argv)
    if options.min_votes < 1:
        raise InputError(f"--min_votes {options.min_votes}: must be 1 or more")
    _check_new(options.out, options.store)
    with Store(options.store) as store:
        found = export(store, options.votes, options.min_votes)
    if options.form != "ours":  # which alone says that neither side is better
        uneven = [row for row in found.rows if row.get("preference") != 0.5]
        if len(uneven) < len(found.rows):
            found.left_out[f"even rows, which {options.form} cannot hold"] = len(found.rows) - len(uneven)
        found.rows = uneven
    rows = [formed(row, options.form) for row in found.rows]
    if not rows:
        raise InputError(f"{options.store}: no item gives a row ({found.summary()}); ask for more judgements")
    _write(rows, options.out)
    say(notice("rows", f"{found.summary()}"))
    for note in found.notes:
        say(notice("note", printable(note)))
    say(notice("next", f"python -m rlhf_lightning fit --config reward_model.yaml --data.path {options.out}"))
    return 0


def _import(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="python -m rlhf_lightning preferences import",
        description="Makes rows with prompt, chosen and rejected of any pairs that fit reads, TRL's and HH's among "
        "them. annotate reads them as candidates and as gold.",
    )
    parser.add_argument("file", metavar="FILE", help="the rows")
    parser.add_argument("--out", required=True, metavar="FILE", help="the new rows, one JSON object a line")
    options = parser.parse_args(argv)
    _check_new(options.out, options.file)
    records = load_records(options.file)
    rows = [row for record in records.rows for row in _compared(record)]
    if not rows:
        raise InputError(f"{options.file}: holds no pair; give rows that compare answers")
    _write(rows, options.out)
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(records.dropped.items()))
    say(notice("rows", f"{len(rows):,} pairs of {records.read:,} rows; left out: {dropped or 'none'}"))
    return 0


def formed(row: RowOut, form: Written) -> RowOut:
    """A row in another form.

    Raises:
        InputError: the row has no two sides, or a transcript cannot hold its turns.
    """
    check_choice("--form", form, Written)
    if form == "ours":
        return row
    if "chosen" not in row:
        raise InputError(f"--form {form}: holds pairs, and item {row['id']!r} is graded; use --form ours")
    if form == "hh":
        for key in ("chosen", "rejected"):
            _check_marks(row[key], row["id"])
        opening = _transcript(checked_prompt(row["prompt"], str(row["id"]), "prompt"), row["id"])
        return {key: f"{opening}{ASSISTANT} {row[key]}" for key in ("chosen", "rejected")}
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    sides = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    return {"prompt": prompt, **sides}


def _check_marks(text: str, name: str) -> None:
    """Refuses a text that would be read as several turns."""
    mark = next((mark for mark in (HUMAN, ASSISTANT) if mark in text), None)
    if mark is not None:
        raise InputError(f"--form hh: item {name!r} has {mark!r} in a text, which would begin another turn; use trl")


def _transcript(prompt: Prompt, name: str) -> str:
    for text in [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]:
        _check_marks(text, name)
    if isinstance(prompt, str):
        return f"{HUMAN} {prompt}"
    system = prompt[0].content if prompt[0].role == "system" else ""
    turns = prompt[1:] if system else prompt
    strange = next((turn.role for turn in turns if turn.role not in _SPEAKERS), None)
    if strange is not None:
        raise InputError(f"--form hh: item {name!r} has a {strange} message, which a transcript cannot hold; use trl")
    return system + "".join(f"{_SPEAKERS[turn.role]} {turn.content}" for turn in turns)


def _compared(record: Record) -> list[RowOut]:
    """A row for each pair of a record, with its other columns."""
    if not record.pairs:
        return []
    prompt = record.messages if record.form.transcript or not isinstance(record.prompt, str) else record.prompt
    shown = prompt if isinstance(prompt, str) else [message.turn() for message in prompt]
    name = str(record.columns.get("id", record.row + 1))
    rows = []
    for number, (better, worse) in enumerate(record.pairs):
        several = f":{number}" if len(record.pairs) > 1 else ""
        sides = (_response(record.responses[better], record), _response(record.responses[worse], record))
        row = {"id": name + several, "prompt": shown, "chosen": sides[0], "rejected": sides[1]}
        numbers = {"margin": (record.margin, 0.0), "weight": (record.weight, 1.0)}
        numbers["preference"] = (record.preference, 1.0)
        row |= {key: value for key, (value, usual) in numbers.items() if value != usual}
        if record.tools:
            row["tools"] = json.loads(record.tools)
        rows.append({**row, **{key: value for key, value in record.columns.items() if key not in row}})
    return rows


def _response(response: Response, record: Record) -> Any:
    if isinstance(response, str):
        return response.strip() if record.form.transcript else response
    return [message.turn() for message in response]


def _check_new(out: str, source: str) -> None:
    check_output(out, "--out", [source])
    if Path(out).exists():
        raise InputError(f"--out {out}: exists already; name another file, or delete it")


def _write(rows: Sequence[RowOut], out: str) -> None:
    write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
