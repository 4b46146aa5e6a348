"""The three ways to judge answers: pairs, rankings and ratings.

A task reads what the page sends, where answers stand in the order in which they were shown, and gives the judgement in
the item's own order, which the store keeps. ``order[p]`` is the answer of the item that is shown at place ``p``.

| task | the page sends | the store keeps |
|---|---|---|
| pairs | ``{"choice": "a"/"b"/"tie"/"both_bad", "strength": 1..3 or null, "criteria": {name: "a"/"b"/"tie"}}`` | the same with ``first`` for the item's first answer and ``second`` for the other |
| ranking | ``{"ranks": [1, 2, 2, null]}``: 1 is the best, equal numbers tie, null is not ranked | the ranks in the item's order, without gaps |
| rating | ``{"ratings": [{name: 1..5}]}`` for each answer | the ratings in the item's order |
"""  # noqa: E501

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rlhf_lightning.errors import InputError

TaskName = Literal["pairs", "ranking", "rating"]
Value = dict[str, Any]  # a judgement as JSON values
OVERALL = "overall"  # the criterion of a rating without criteria
SCALE = (1, 5)
STRENGTHS = (1, 2, 3)


class Task(ABC):
    """A way to judge.

    Args:
        criteria: names of what is judged beside the whole, or in place of it for ratings.
    """

    name: TaskName
    fewest = 2  # answers of an item
    pairwise = False  # exactly two answers are shown
    shows = "2 or more"
    gold_form: str

    def __init__(self, criteria: Sequence[str] = ()) -> None:
        self.criteria = tuple(criteria)

    @abstractmethod
    def answer(self, sent: Any, order: Sequence[int]) -> Value:
        """What the page sent, in the item's order. Raises InputError for what is no judgement of this task."""

    @abstractmethod
    def shown(self, kept: Value, order: Sequence[int]) -> Value:
        """The inverse of `answer`: what the page shows for a kept judgement."""

    @abstractmethod
    def gold(self, given: Any, count: int) -> Value:
        """The gold judgement of a row with ``count`` answers. Raises InputError if it does not fit."""

    @abstractmethod
    def agrees(self, kept: Value, other: Value) -> bool:
        """Whether two judgements say the same: as a check against gold, or against an earlier one of the same item."""


class Pairs(Task):
    """Which of two answers is better: A, B, a tie, or both are bad; perhaps with a strength and criteria."""

    name: TaskName = "pairs"
    pairwise = True
    shows = "exactly 2"
    gold_form = "'first', 'second', 'tie' or 'both_bad'"

    def answer(self, sent: Any, order: Sequence[int]) -> Value:
        """Reads choice, strength and criteria."""
        _check_keys(sent, ("choice", "strength", "criteria"))
        names = _sides(order)
        if sent.get("choice") not in (*names, "tie", "both_bad"):
            raise InputError(f"choice: must be a, b, tie or both_bad, got {sent.get('choice')!r}")
        strength = sent.get("strength")
        if strength is not None and (type(strength) is not int or strength not in STRENGTHS):
            raise InputError(f"strength: must be 1, 2, 3 or null, got {strength!r}")
        if strength is not None and sent["choice"] not in names:
            raise InputError(f"strength: says how much better one answer is, and the choice is {sent['choice']!r}")
        criteria = sent.get("criteria") or {}
        self._check_criteria(criteria)
        for name, choice in criteria.items():
            if choice not in (*names, "tie"):
                raise InputError(f"criteria.{name}: must be a, b or tie, got {choice!r}")
        kept = {"choice": names.get(sent["choice"], sent["choice"]), "strength": strength}
        if self.criteria:
            kept["criteria"] = {name: names.get(choice, choice) for name, choice in criteria.items()}
        return kept

    def shown(self, kept: Value, order: Sequence[int]) -> Value:
        """Puts a and b for first and second."""
        names = {kept: side for side, kept in _sides(order).items()}
        shown = {**kept, "choice": names.get(kept["choice"], kept["choice"])}
        if "criteria" in kept:
            shown["criteria"] = {name: names.get(choice, choice) for name, choice in kept["criteria"].items()}
        return shown

    def gold(self, given: Any, count: int) -> Value:
        """Reads the word."""
        if given not in ("first", "second", "tie", "both_bad"):
            raise InputError(f"must be {self.gold_form}, got {given!r}")
        return {"choice": given, "strength": None}

    def agrees(self, kept: Value, other: Value) -> bool:
        """Whether the choices are equal. Both bad also agrees with a tie: neither is better."""
        even = ("tie", "both_bad")
        return kept["choice"] == other["choice"] or (kept["choice"] in even and other["choice"] in even)

    def _check_criteria(self, given: Any) -> None:
        if not isinstance(given, dict) or not set(given) <= set(self.criteria):
            raise InputError(f"criteria: must be of {list(self.criteria)}, got {given!r}")


class Ranking(Task):
    """The order of the answers from the best, with ties; answers may be left out."""

    name: TaskName = "ranking"
    gold_form = "a rank for each answer, 1 for the best, null for one that is not ranked"

    def answer(self, sent: Any, order: Sequence[int]) -> Value:
        """Reads the ranks."""
        _check_keys(sent, ("ranks",))
        ranks = self._ranks(sent.get("ranks"), len(order))
        return {"ranks": [ranks[order.index(place)] for place in range(len(order))]}

    def shown(self, kept: Value, order: Sequence[int]) -> Value:
        """Puts the ranks into the shown order."""
        return {"ranks": [kept["ranks"][place] for place in order]}

    def gold(self, given: Any, count: int) -> Value:
        """Reads the ranks."""
        ranks = self._ranks(given, count)
        if len({rank for rank in ranks if rank is not None}) < 2:
            raise InputError("ranks: all are tied, which no judgement could contradict; rank one answer above another")
        return {"ranks": ranks}

    def agrees(self, kept: Value, other: Value) -> bool:
        """Whether no two answers that both have ranked stand in opposite order, and one pair at least can be compared.

        A tie does not contradict an order.
        """
        mine, theirs = kept["ranks"], other["ranks"]
        both = [i for i in range(len(mine)) if mine[i] is not None and theirs[i] is not None]
        pairs = [(i, j) for i in both for j in both if i < j]
        opposite = any((mine[i] - mine[j]) * (theirs[i] - theirs[j]) < 0 for i, j in pairs)
        return bool(pairs) and not opposite

    @staticmethod
    def _ranks(given: Any, count: int) -> list[int | None]:
        if not isinstance(given, list) or len(given) != count:
            raise InputError(f"ranks: must be a list of {count}, one for each answer, got {given!r}")
        if any(rank is not None and (type(rank) is not int or rank < 1) for rank in given):
            raise InputError(f"ranks: must be whole numbers from 1, or null, got {given!r}")
        if sum(rank is not None for rank in given) < 2:
            raise InputError("ranks: at least two answers must be ranked; skip the item if that is not possible")
        places = {rank: place for place, rank in enumerate(sorted({rank for rank in given if rank is not None}), 1)}
        return [None if rank is None else places[rank] for rank in given]


class Rating(Task):
    """A number for each answer, on a scale from 1 to 5, for each criterion or for the whole."""

    name: TaskName = "rating"
    fewest = 1
    shows = "1 or more"
    gold_form = "a number from 1 to 5 for each answer, or an object with one for each criterion"

    def answer(self, sent: Any, order: Sequence[int]) -> Value:
        """Reads the ratings."""
        _check_keys(sent, ("ratings",))
        ratings = self._ratings(sent.get("ratings"), len(order))
        if not all(set(rating) == set(self.names) for rating in ratings):
            raise InputError(f"ratings: every answer needs {', '.join(self.names)}; skip the item if that is not clear")
        return {"ratings": [ratings[order.index(place)] for place in range(len(order))]}

    def shown(self, kept: Value, order: Sequence[int]) -> Value:
        """Puts the ratings into the shown order."""
        return {"ratings": [kept["ratings"][place] for place in order]}

    def gold(self, given: Any, count: int) -> Value:
        """Reads one number or object for each answer; criteria that are left out are not compared."""
        if isinstance(given, list):
            given = [value if isinstance(value, dict) else dict.fromkeys(self.names, value) for value in given]
        ratings = self._ratings(given, count)
        if not any(ratings):
            raise InputError("ratings: there is no number, so no judgement could differ; rate one answer at least")
        return {"ratings": ratings}

    def agrees(self, kept: Value, other: Value) -> bool:
        """Whether no two ratings of one answer and criterion are more than one step apart."""
        return all(
            abs(value - theirs[name]) <= 1
            for mine, theirs in zip(kept["ratings"], other["ratings"], strict=True)
            for name, value in mine.items()
            if name in theirs
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The criteria, or the one of the whole."""
        return self.criteria or (OVERALL,)

    def _ratings(self, given: Any, count: int) -> list[dict[str, int]]:
        if not isinstance(given, list) or len(given) != count or not all(isinstance(value, dict) for value in given):
            raise InputError(f"ratings: must be a list of {count}, one for each answer, got {given!r}")
        low, high = SCALE
        for rating in given:
            for name, value in rating.items():
                if name not in self.names:
                    raise InputError(f"ratings: {name!r} is no criterion; there is {', '.join(self.names)}")
                if type(value) is not int or not low <= value <= high:
                    raise InputError(f"ratings.{name}: must be a whole number from {low} to {high}, got {value!r}")
        return [dict(rating) for rating in given]


def task_of(name: str, criteria: Sequence[str] = ()) -> Task:
    """The task of this name. Raises InputError for another word, or for criteria that rankings cannot have."""
    for kind in (Pairs, Ranking, Rating):
        if kind.name == name:
            if criteria and kind is Ranking:
                raise InputError("--criteria: a ranking has none; use --task pairs or rating, or leave them out")
            return kind(criteria)
    raise InputError(f"--task: expected {', '.join(get_args(TaskName))}, got {name!r}")


def _sides(order: Sequence[int]) -> dict[str, str]:
    """What the page calls an answer, and what the store calls it."""
    kept = ("first", "second")
    return {"a": kept[order[0]], "b": kept[order[1]]}


def _check_keys(sent: Any, known: Sequence[str]) -> None:
    if not isinstance(sent, dict):
        raise InputError(f"value: must be an object with {', '.join(known)}, got {sent!r}")
    unknown = sorted(set(sent) - set(known))
    if unknown:
        raise InputError(f"value: has an unknown key {unknown[0]!r}; there is {', '.join(known)}")
