"""Reads the items that people judge: rows with several answers, and gold rows whose right judgement is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.files import RawRow, faulty_text, kind_of, shown
from rlhf_lightning.data.kept_columns import plain
from rlhf_lightning.data.messages import checked_prompt, checked_response
from rlhf_lightning.data.readers import read_rows
from rlhf_lightning.data.values import Message, Response, checked_list, checked_text, refused
from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.tasks import Task

_SIDES = (("chosen", "rejected"), ("response_a", "response_b"))  # keys of rows with two answers
_OWN = ("id", "prompt", "completions", "gold", "explanation", *_SIDES[0], *_SIDES[1])  # keys that an item has as fields


@dataclass(frozen=True)
class Item:
    """One thing to judge: a prompt with the completions that are shown together."""

    id: str
    row: str  # the id of the row that it was made of
    prompt: str | list[dict[str, Any]]  # as in the row
    completions: tuple[str, ...]
    places: tuple[int, ...]  # the place of each answer in the row's completions
    columns: dict[str, Any]  # the row's other keys, such as `policies`
    gold: Any = None  # the right judgement as `Task.answer` gives it; None if nobody knows it
    explanation: str = ""  # why the gold judgement is right

    def turns(self) -> list[dict[str, str]]:
        """The prompt as the page shows it: turns with role and text, and tool calls as their JSON."""
        prompt = checked_prompt(self.prompt, self.id, "prompt")
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        return [{"role": message.role, "content": _said(message)} for message in prompt]

    def content(self) -> dict[str, Any]:
        """The item as JSON values, for the store."""
        return dict(self.__dict__)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Item:
        """The item that `content` was made of."""
        return cls(**{**content, "completions": tuple(content["completions"]), "places": tuple(content["places"])})


@dataclass
class Items:
    """The items of a file, in its order, and the rows that gave none, by reason."""

    items: list[Item] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    rows: int = 0

    def summary(self) -> str:
        """One line, like ``12 items of 5 rows; left out: 1 row with equal answers``."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return f"{len(self.items):,} items of {self.rows:,} rows" + (f"; left out: {reasons}" if reasons else "")


def read_candidates(path: str, task: Task) -> Items:
    """The items of a candidate file: ``{"id", "prompt", "completions", ...}``, as `generate` writes them.

    For pairs, every two different answers of a row make an item. The first pair of each row comes before the second
    pair of any, so that a study which ends early has seen every prompt.

    Raises:
        InputError: the file has no rows; a row lacks a prompt or answers, has too few of them, or an id that another
            row has. The message names file, line and key.
    """
    found = Items()
    rounds: list[list[Item]] = []
    seen: dict[str, str] = {}
    for where, line, row in _rows(path):
        found.rows += 1
        name = _id(row, line, where, seen)
        prompt, answers, columns = _prompt(row, where), _answers(row, where), _columns(row, where)
        if len(answers) < task.fewest:
            problem = f"has {len(answers)} answer{'s'[: len(answers) != 1]}; {task.name} needs {task.fewest} or more"
            raise refused(where, "completions", f"{problem}: generate with a higher --count, or delete the row")
        groups = list(_groups(answers, task))
        if not groups:
            reason = "rows whose answers are all equal"
            found.left_out[reason] = found.left_out.get(reason, 0) + 1
        for number, places in enumerate(groups):
            whole = len(places) == len(answers)
            item_id = name if whole else f"{name}:{'-'.join(map(str, places))}"
            item = Item(item_id, name, prompt, tuple(answers[place] for place in places), places, columns)
            rounds.extend([] for _ in range(number + 1 - len(rounds)))
            rounds[number].append(item)
    found.items = list(itertools.chain.from_iterable(rounds))
    if not found.items:
        raise InputError(f"{path}: holds nothing to judge ({found.summary()}); give rows with prompt and completions")
    return found


def read_gold(path: str, task: Task) -> Items:
    """The gold items of a file: candidate rows with the right judgement under ``gold``, perhaps an ``explanation``.

    ``gold`` has the form that `Task.gold` reads. A row with ``chosen`` and ``rejected`` needs none for pairs.

    Raises:
        InputError: as for `read_candidates`, or the gold judgement is missing or does not fit the row's answers.
    """
    found = Items()
    seen: dict[str, str] = {}
    for where, line, row in _rows(path):
        found.rows += 1
        name = _id(row, line, where, seen)
        answers = _answers(row, where)
        if len(answers) < task.fewest or (task.pairwise and len(answers) != 2):
            raise refused(where, "completions", f"has {len(answers)} answers; {task.name} needs {task.shows}")
        given = row.get("gold", "first" if task.pairwise and "chosen" in row else None)
        if given is None:
            raise refused(where, "gold", f"is missing; give the right judgement: {task.gold_form}")
        try:
            gold = task.gold(given, len(answers))
        except InputError as error:
            raise refused(where, "gold", str(error)) from None
        why = checked_text(row.get("explanation") or "", where, "explanation")
        places, prompt = tuple(range(len(answers))), _prompt(row, where)
        found.items.append(Item(f"gold:{name}", name, prompt, tuple(answers), places, _columns(row, where), gold, why))
    if not found.items:
        raise InputError(f"{path}: holds no rows; give candidate rows with a 'gold' judgement")
    return found


def _rows(path: str) -> Iterator[tuple[str, int, RawRow]]:
    for line, row in read_rows(path, lambda row: "prompt" in row):
        if isinstance(row, InputError):
            raise row
        for key, value in row.items():
            if fault := faulty_text(key) or faulty_text(value):
                raise refused(f"{path}:{line}", shown(key), f"{fault}; repair the text")
        yield f"{path}:{line}", line, row


def _id(row: RawRow, line: int, where: str, seen: dict[str, str]) -> str:
    given = row.get("id", line)
    if isinstance(given, bool) or not isinstance(given, str | int) or str(given).strip() == "":
        raise refused(where, "id", f"must be text or a whole number, got {kind_of(given)}; repair the row")
    name = str(given)
    if name in seen:
        raise refused(where, "id", f"is {name!r} as in {seen[name]}; each row needs an id of its own")
    seen[name] = where
    return name


def _prompt(row: RawRow, where: str) -> str | list[dict[str, Any]]:
    if "prompt" not in row:
        raise refused(where, "prompt", f"is missing (keys found: {', '.join(row) or 'none'}); give the text to answer")
    checked_prompt(row["prompt"], where, "prompt")
    given = row["prompt"]
    return [given] if isinstance(given, dict) else given


def _columns(row: RawRow, where: str) -> dict[str, Any]:
    """The other columns in JSON's types."""
    found = {}
    for key, value in row.items():
        if key in ("system", "history") and value:
            raise refused(where, key, "is not shown to annotators; put it into the prompt, as messages")
        if key not in _OWN:
            try:
                found[key] = plain(value)
            except TypeError as error:
                raise refused(where, shown(key), f"holds {error}, which has no place in JSON; leave it out") from None
    return found


def _said(message: Message) -> str:
    return "\n".join(part for part in (message.content, message.more) if part)


def _answers(row: RawRow, where: str) -> list[str]:
    """The answers of a row as texts, under whichever keys they stand."""
    if "completions" in row:
        values = checked_list(row["completions"], where, "completions")
        named = [(f"completions[{i}]", value) for i, value in enumerate(values)]
        return [_text(checked_response(value, where, key), where, key) for key, value in named]
    for keys in _SIDES:
        if all(key in row for key in keys):
            return [_text(checked_response(row[key], where, key), where, key) for key in keys]
    found = f"keys found: {', '.join(row) or 'none'}"
    raise refused(where, "completions", f"is missing ({found}); give the list of answers, or chosen and rejected")


def _text(response: Response, where: str, key: str) -> str:
    if isinstance(response, str):
        return response
    raise refused(where, key, "has several messages or a tool call, and people judge one text; give the text alone")


def _groups(answers: list[str], task: Task) -> Iterator[tuple[int, ...]]:
    """The places of the answers of each item. Equal answers are shown once; their judgement would say nothing."""
    different = [i for i, text in enumerate(answers) if text not in answers[:i]]
    if task.pairwise:
        yield from itertools.combinations(different, 2)
    elif len(different) >= task.fewest:
        yield tuple(different)


def check_ids(items: Iterable[Item]) -> None:
    """Refuses two items of one id: a pair's id is its row's with the places, which another row may be called."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"two items are called {item.id!r}; rename the rows: a pair is called ROW:PLACE-PLACE")
        seen.add(item.id)
