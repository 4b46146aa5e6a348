"""Turns judgements into numbers: one unit is one thing that several people judged, with a value from each of them.

| source | a unit | its category | its value on a scale |
|---|---|---|---|
| pairs | an item, and each criterion of it | first, second, or neither | minus the strength for the first, 0 for neither, the strength for the second; a missing strength is 2, the middle one |
| rankings | two answers that the annotator ranked both | first, second, or a tie | -1, 0, 1 |
| ratings | an answer and a criterion; of several criteria also their mean, as the whole | the rating | the rating |
| rows with ``preferences`` | the row | below 1.5 the first, above the second, none at 1.5 | the number from 1 to 2 |
"""  # noqa: E501

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_lightning.data.files import kind_of
from rlhf_lightning.data.readers import read_rows
from rlhf_lightning.data.values import checked_number, refused
from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement
from rlhf_lightning.preferences.tasks import OVERALL, Task

Numbers = NDArray[np.float64]
_MIDDLE = 2  # the strength of a choice without one
_SIDES = {"first": -1, "second": 1, "tie": 0, "both_bad": 0}


class Mark(NamedTuple):
    """One value that one annotator gave to one unit."""

    unit: tuple[str, str, str]  # item, criterion, and what of the item
    annotator: str
    category: float  # NaN if it is none
    value: float


@dataclass(frozen=True)
class Units:
    """Values of ``A`` annotators for ``U`` units; NaN where one gave none."""

    annotators: tuple[str, ...]
    items: tuple[str, ...]  # [U] the item of each unit
    criteria: tuple[str, ...]  # [U] the criterion of each unit
    categories: Numbers  # [A, U]
    values: Numbers  # [A, U]

    @classmethod
    def of(cls, marks: Iterable[Mark]) -> Units:
        """The table of these values; of two for one unit by one annotator the last counts."""
        cells = {(mark.unit, mark.annotator): mark for mark in marks}
        units = {unit: place for place, unit in enumerate(dict.fromkeys(unit for unit, _ in cells))}
        names = {name: place for place, name in enumerate(sorted({name for _, name in cells}))}
        categories, values = (np.full((len(names), len(units)), np.nan) for _ in range(2))
        for (unit, name), mark in cells.items():
            categories[names[name], units[unit]] = mark.category
            values[names[name], units[unit]] = mark.value
        return cls(tuple(names), tuple(unit[0] for unit in units), tuple(unit[1] for unit in units), categories, values)

    def chosen(self, units: Sequence[int], annotators: Sequence[int] | None = None) -> Units:
        """The same for some units, and some annotators."""
        kept = np.asarray(units, dtype=np.int64)
        people = np.arange(len(self.annotators)) if annotators is None else np.asarray(annotators, dtype=np.int64)
        return Units(
            tuple(self.annotators[i] for i in people),
            tuple(self.items[i] for i in kept),
            tuple(self.criteria[i] for i in kept),
            self.categories[np.ix_(people, kept)],
            self.values[np.ix_(people, kept)],
        )

    def whole(self) -> Units:
        """The units of the whole; all where only one criterion was judged."""
        return self.of_criterion(OVERALL) if OVERALL in self.criteria else self

    def of_criterion(self, name: str) -> Units:
        """The units of one criterion."""
        return self.chosen([place for place, criterion in enumerate(self.criteria) if criterion == name])


def store_units(judgements: Iterable[Judgement], task: Task) -> Units:
    """The units of a study: of the real items, without gold and repeats. Skips have none."""
    return Units.of(mark for row in judgements if row.part == "real" and row.value for mark in _marks(row, task))


def _marks(row: Judgement, task: Task) -> Iterator[Mark]:
    value: dict[str, Any] = row.value or {}
    if task.name == "pairs":
        side = _SIDES[value["choice"]]
        yield Mark((row.item, OVERALL, ""), row.annotator, side, side * (value["strength"] or _MIDDLE))
        for name, choice in value.get("criteria", {}).items():
            yield Mark((row.item, name, ""), row.annotator, _SIDES[choice], _SIDES[choice])
    elif task.name == "ranking":
        ranks = value["ranks"]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] is not None and ranks[j] is not None:
                sign = float((ranks[i] > ranks[j]) - (ranks[i] < ranks[j]))
                yield Mark((row.item, OVERALL, f"{i}-{j}"), row.annotator, sign, sign)
    else:
        for place, ratings in enumerate(value["ratings"]):
            for name, number in ratings.items():
                yield Mark((row.item, name, str(place)), row.annotator, number, number)
            if len(ratings) > 1 and OVERALL not in ratings:  # criteria have scales of their own: never one pool of them
                mean = float(np.mean(list(ratings.values())))
                yield Mark((row.item, OVERALL, str(place)), row.annotator, mean, mean)


@dataclass(frozen=True)
class Choice:
    """A choice between two answers with what may have led to it: the side, and the lengths."""

    annotator: str
    item: str
    second: bool  # the second answer was chosen
    left: int | None  # the answer that was shown left, 0 or 1; None if nobody knows
    lengths: tuple[int, int]  # letters of the two answers


def store_choices(judgements: Iterable[Judgement], items: dict[str, Item], task: Task) -> list[Choice]:
    """The decided choices of a study of pairs; none of another task."""
    if task.name != "pairs":
        return []
    found = []
    for row in judgements:
        side = _SIDES[row.value["choice"]] if row.value is not None else 0
        if row.part == "real" and side:
            first, second = (len(text) for text in items[row.item].completions)
            found.append(Choice(row.annotator, row.item, side > 0, row.shown[0], (first, second)))
    return found


def file_units(path: str) -> tuple[Units, list[Choice]]:
    """The units of rows with ``preferences: {annotator: value}``: 1 for the first answer, 2 for the second.

    Raises:
        InputError: a row has no preferences, or a value that is no number from 1 to 2; with file, line and key.
    """
    marks: list[Mark] = []
    choices: list[Choice] = []
    seen: dict[str, str] = {}
    for line, row in read_rows(path, lambda row: "preferences" in row):
        if isinstance(row, InputError):
            raise row
        where = f"{path}:{line}"
        given = row.get("preferences")
        if not isinstance(given, dict):
            remedy = "give an object with a number from 1 to 2 for each annotator"
            raise refused(where, "preferences", f"must be an object, got {kind_of(given)}; {remedy}")
        name = f"row {line}" if row.get("id") is None else str(row["id"])
        if name in seen:
            raise refused(where, "id", f"is {name!r} as in {seen[name]}; each row needs an id of its own")
        seen[name] = where
        lengths = tuple(len(str(row.get(key) or "")) for key in ("response_a", "response_b"))
        for annotator, number in given.items():
            if number is None:
                continue
            value = checked_number(number, where, f"preferences.{annotator}")
            if not 1 <= value <= 2:
                problem = f"must be from 1 (the first answer) to 2 (the second), got {value:g}"
                raise refused(where, f"preferences.{annotator}", problem)
            category = float("nan") if value == 1.5 else float(value > 1.5) + 1
            marks.append(Mark((name, OVERALL, ""), annotator, category, value))
            if value != 1.5:
                choices.append(Choice(annotator, name, value > 1.5, None, (lengths[0], lengths[1])))
    if not marks:
        raise InputError(f"{path}: holds no judgements; give rows with preferences, or the store that annotate made")
    return Units.of(marks), choices
