"""Chooses the responses of a record that a view learns from, and refuses records that lack them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlhf_lightning.data.files import shown
from rlhf_lightning.data.hints import meant, renaming
from rlhf_lightning.data.refusals import Refusals
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.values import refused
from rlhf_lightning.errors import InputError, check_choice

Kind = Literal["demonstrations", "pairs", "labels", "prompts"]

_PAIRS = (("chosen", "rejected"), ("completions", "ratings"), ("completions", "ranks"))


def wanted(record: Record, kind: Kind, demonstrations: bool) -> tuple[tuple[int, ...], ...]:
    """The numbers of the responses that each example of the record takes. `check_fit` has accepted the record."""
    check_choice("kind", kind, Kind)
    if kind == "prompts":
        return ((0,),) if demonstrations and record.responses and not record.form.labelled else ((),)
    return record.pairs if kind == "pairs" else ((0,),)


def check_fit(records: Sequence[Record], kind: Kind, option: str, read: int | None = None, soft: bool = True) -> None:
    """Refuses records that lack the responses or labels that a view needs.

    Args:
        records: all records of the view.
        kind: the view.
        option: the option that renames columns, for the message.
        read: the number of rows in the files, for the message; the number of records if None.
        soft: whether pairs of which it is not certain who is better are accepted.

    Raises:
        InputError: about the first record at fault, with the keys found, the remedy, and the number of such records.
    """
    check_choice("kind", kind, Kind)
    refusals = Refusals()
    for record in records:
        error = _misfit(record, kind, option)
        if error is None and record.preference < 1 and kind in ("pairs", "labels") and not soft:
            problem = f"is {record.preference:g}, and only a reward model learns from uncertain labels"
            error = refused(record.where, "preference", f"{problem}; leave such rows out, or make certain ones")
        if error is not None:
            refusals.add(error)
    if refusals:
        raise refusals.error(len(records) if read is None else read)


def _misfit(record: Record, kind: Kind, option: str) -> InputError | None:
    if kind == "prompts" or (kind == "labels" and record.form.labelled):
        return None
    if kind == "labels":
        hint = renaming(record.columns, ["label"] if record.responses else ["completion", "label"], option)
        remedy = hint or "give all rows 'completion' and 'label', or none"
        return refused(record.where, "label", f"is missing, and other rows have one{_found(record)}; {remedy}")
    if record.form.labelled:
        remedy = {
            "demonstrations": "a demonstration has none; leave out the rows of label false, and the key in the others",
            "pairs": "a comparison has 'chosen' and 'rejected'; responses labelled one by one are for KTOModule, in "
            "data.path and data.val_path alike",
        }[kind]
        return refused(record.where, "label", remedy)
    if kind == "demonstrations" and not record.responses and record.form.conversation:
        answered = any(message.role == "assistant" for message in record.messages)
        speaker = {"user": "user's", "tool": "tool's"}.get(record.messages[-1].role, "system's")
        remedy = f"add the assistant's answer, or {'take the turn off' if answered else 'leave the row out'}"
        return refused(record.where, record.form.key, f"the conversation ends with the {speaker} turn; {remedy}")
    if kind == "demonstrations" and not record.responses:
        hint = renaming(record.columns, ["completion"], option) or renaming(record.columns, ["messages"], option)
        remedy = hint or "add key 'completion', or leave the row out"
        return refused(record.where, "completion", f"there is no response to imitate{_found(record)}; {remedy}")
    if kind == "pairs" and not record.form.compared:
        return refused(record.where, "chosen", f"there is no comparison{_found(record)}; {_comparing(record, option)}")
    return None


def _comparing(record: Record, option: str) -> str:
    """The remedy for a row that has no comparison."""
    for keys in _PAIRS:
        if len(meant(record.columns, keys)) == len(keys):
            return renaming(record.columns, keys, option)
    remedy = "add 'chosen' and 'rejected', or completions with ranks or ratings"
    if record.responses and (label := renaming(record.columns, ["label"], option)):
        return f"{remedy}; for KTOModule {label}"
    return f"{remedy} (for KTOModule a 'completion' with 'label' true or false does too)"


def _found(record: Record) -> str:
    return f"; keys found: {', '.join(sorted(map(shown, record.raw)))}" if record.raw else ""
