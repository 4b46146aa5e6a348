"""Makes rows to train on of the judgements in a store. Every judgement stays in its row, under ``votes``.

| task | votes | a row |
|---|---|---|
| pairs | ``soft`` | ``preference`` is the share of votes for ``chosen``; a tie is half a vote for each |
| pairs | ``majority`` | the answer with most votes is ``chosen``; where both have as many, the item gives no row; ``margin`` is the mean strength of the votes for it (Touvron et al. 2023, arXiv 2307.09288, table 27: 1 to 3), if they have one |
| pairs | ``dawid_skene`` | ``preference`` is the posterior of the annotators' model, see `dawid_skene` |
| ranking | ``soft`` | one row for each annotator |
| ranking | ``majority`` | one row for each item, by mean rank of the answers that all have ranked |
| rating | ``soft`` | one row for each annotator |
| rating | ``majority`` | one row for each item, by mean rating |

Of soft votes and of the model's, a row on which nobody preferred an answer has ``tie``: true. An item whose answers are
both bad to everyone gives no row.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlhf_lightning.data.columns import KEYS
from rlhf_lightning.data.kept_columns import free_names
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.preferences.dawid_skene import fit
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Store

Votes = Literal["soft", "majority", "dawid_skene"]
RowOut = dict[str, Any]
_CLASSES = ("first", "second", "neither")
_CLASS = {"first": 0, "second": 1, "tie": 2, "both_bad": 2}
_OTHERS = {"calibration": "calibration items", "gold": "gold items", "repeat": "repeats"}
_OURS = ("votes", "agreement", "criteria", "criteria_ratings", "tie", "annotator", "seconds", "comment", "flag", "at")
_FOR_SECOND = np.array([0.0, 1.0, 0.5])


@dataclass
class Exported:
    """Rows, and what is not among them, by reason."""

    rows: list[RowOut] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line, like ``12 rows; left out: 2 items with a draw``."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return f"{len(self.rows):,} rows; left out: {reasons or 'none'}"


def export(store: Store, votes: Votes, min_votes: int = 1) -> Exported:
    """The rows of a store, in the order of its items. Gold items and repeats give none.

    Args:
        store: the store.
        votes: how several judgements of an item become one row.
        min_votes: judgements that an item needs.

    Raises:
        InputError: there are no judgements, or the task has no such votes.
    """
    check_choice("--votes", votes, Votes)
    if votes == "dawid_skene" and store.task.name != "pairs":
        raise InputError(
            f"--votes dawid_skene: is for pairs, and the store has {store.task.name}s; use soft or majority"
        )
    items = {item.id: item for part, item in store.items() if part == "real"}
    given: dict[str, list[Judgement]] = {name: [] for name in items}
    found = Exported()
    for row in store.judgements():
        if row.part == "real" and row.value is not None:
            given[row.item].append(row)
        else:
            found.left_out[_without_vote(row)] += 1
    flagged = sum(row.flag is not None for rows in given.values() for row in rows)
    if flagged:
        found.notes.append(f"{flagged:,} votes have a flag; they count, and the flag stands in the row's votes")
    if not any(given.values()):
        raise InputError(f"{store.path}: has no judgements yet; annotate first")
    used = {name: rows for name, rows in given.items() if len(rows) >= min_votes}
    few = sum(0 < len(rows) < min_votes for rows in given.values())
    for reason, count in (("items that nobody judged", sum(not rows for rows in given.values())),
                          (f"items with fewer than {min_votes} votes", few)):  # fmt: skip
        if count:
            found.left_out[reason] = count
    if store.task.name == "pairs":
        _pairs(items, used, votes, found)
    else:
        for name, rows in used.items():
            by_item = votes == "majority"
            make = _ranked if store.task.name == "ranking" else _rated
            found.rows += [row for row in make(items[name], rows, by_item) if _usable(row, found)]
    return found


def _without_vote(row: Judgement) -> str:
    """Why a judgement is no vote."""
    if row.part == "real":
        return "skipped judgements" if row.flag is None else "flags without a judgement"
    return f"judgements of {_OTHERS[row.part]}"


def _pairs(items: dict[str, Item], used: dict[str, list[Judgement]], votes: Votes, found: Exported) -> None:
    names = list(used)
    second = [_mean_second(used[name]) for name in names]
    accuracy: dict[str, float] = {}
    if votes == "dawid_skene":
        people = sorted({row.annotator for rows in used.values() for row in rows})
        counts = np.zeros((len(names), len(people), len(_CLASSES)))
        for place, name in enumerate(names):
            for row in used[name]:
                counts[place, people.index(row.annotator), _CLASS[(row.value or {})["choice"]]] += 1
        model = fit(counts)
        second = (model.posterior @ _FOR_SECOND).tolist()
        accuracy = dict(zip(people, model.accuracy().tolist(), strict=True))
        share = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
        found.notes.append(f"the model's accuracy of each annotator: {share}")
        if not model.converged:
            found.notes.append(f"the model did not converge in {model.steps} steps: do not trust its votes")
    bad = sum((row.value or {})["choice"] == "both_bad" for rows in used.values() for row in rows)
    if bad:
        found.notes.append(f"{bad:,} votes say that both answers are bad; beside other votes they count as ties")
    for name, p in zip(names, second, strict=True):
        rows = used[name]
        if all((row.value or {})["choice"] == "both_bad" for row in rows):
            found.left_out["items whose answers are both bad to everyone"] += 1
            continue
        if votes == "majority":
            counts_of = Counter((row.value or {})["choice"] for row in rows)
            if counts_of["first"] == counts_of["second"]:
                found.left_out["items without a majority"] += 1
                continue
            p = float(counts_of["second"] > counts_of["first"])
        found.rows.append(_pair(items[name], rows, p, votes))


def _pair(item: Item, rows: Sequence[Judgement], p: float, votes: Votes) -> RowOut:
    chosen = int(p > 0.5)
    sides = (item.completions[chosen], item.completions[1 - chosen])
    row: RowOut = {"id": item.id, "prompt": item.prompt, "chosen": sides[0], "rejected": sides[1]}
    if votes != "majority":
        row["preference"] = round(p if chosen else 1 - p, 6)
        if all(_CLASS[(one.value or {})["choice"]] == 2 for one in rows):
            row["tie"] = True
    else:
        strengths = [
            (one.value or {}).get("strength") for one in rows if (one.value or {})["choice"] == _CLASSES[chosen]
        ]
        given = [strength for strength in strengths if strength is not None]
        if given:
            row["margin"] = round(float(np.mean(given)), 6)
    row["agreement"] = _agreement(rows)
    criteria = _criteria(rows, chosen)
    if criteria:
        row["criteria"] = criteria
    policies = item.columns.get("policies")
    if isinstance(policies, list) and len(policies) > max(item.places):
        row["policies"] = [policies[item.places[place]] for place in (chosen, 1 - chosen)]
    row["votes"] = [_vote(one, chosen) for one in rows]
    return {**_columns(item, row), **row}


def _mean_second(rows: Sequence[Judgement]) -> float:
    return float(np.mean([_FOR_SECOND[_CLASS[(row.value or {})["choice"]]] for row in rows]))


def _agreement(rows: Sequence[Judgement]) -> float:
    """The share of votes that the most frequent choice has."""
    counts = Counter(_CLASS[(row.value or {})["choice"]] for row in rows)
    return round(max(counts.values()) / len(rows), 6)


def _criteria(rows: Sequence[Judgement], chosen: int) -> dict[str, float]:
    """For each criterion the mean vote for the chosen answer; a tie is half a vote."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, choice in (row.value or {}).get("criteria", {}).items():
            second = float(_FOR_SECOND[_CLASS[choice]])
            found.setdefault(name, []).append(second if chosen else 1 - second)
    return {name: round(float(np.mean(values)), 6) for name, values in found.items()}


def _vote(row: Judgement, chosen: int) -> RowOut:
    """A judgement as a column: sides are named chosen and rejected."""
    sides = {_CLASSES[chosen]: "chosen", _CLASSES[1 - chosen]: "rejected"}
    value = dict(row.value or {})
    vote = {"annotator": row.annotator, "choice": sides.get(value["choice"], value["choice"])}
    if value.get("strength") is not None:
        vote["strength"] = value["strength"]
    if value.get("criteria"):
        vote["criteria"] = {name: sides.get(choice, choice) for name, choice in value["criteria"].items()}
    return {**vote, "left": sides[_CLASSES[row.shown[0]]], **_more(row)}


def _more(row: Judgement) -> RowOut:
    """What every judgement has beside its value, without what is not there."""
    found = {"seconds": row.seconds, "comment": row.comment, "flag": row.flag, "at": row.at}
    return {key: value for key, value in found.items() if value is not None}


def _ranked(item: Item, rows: Sequence[Judgement], by_item: bool) -> Iterator[RowOut]:
    """Rankings of one annotator each, or of all: by the mean rank of the answers that everybody has ranked."""
    lists = [(row.value or {})["ranks"] for row in rows]
    if by_item:
        common = [place for place in range(len(item.completions)) if all(ranks[place] is not None for ranks in lists)]
        within = [_mid_ranks([ranks[place] for place in common]) for ranks in lists]
        means = [float(np.mean(column)) for column in zip(*within, strict=True)]
        ranks = [sum(other < mean for other in set(means)) + 1 for mean in means]
        votes = [{"annotator": row.annotator, "ranks": (row.value or {})["ranks"], **_more(row)} for row in rows]
        yield _graded(item, item.id, common, "ranks", ranks, {"votes": votes})
        return
    for row, given in zip(rows, lists, strict=True):
        places = [place for place, rank in enumerate(given) if rank is not None]
        more = {"annotator": row.annotator, **_more(row)}
        yield _graded(item, f"{item.id}:{row.annotator}", places, "ranks", [given[place] for place in places], more)


def _mid_ranks(ranks: Sequence[int]) -> list[float]:
    """The places of these answers alone; tied ones share the mean of their places."""
    return [sum(other < rank for other in ranks) + (ranks.count(rank) + 1) / 2 for rank in ranks]


def _rated(item: Item, rows: Sequence[Judgement], by_item: bool) -> Iterator[RowOut]:
    """Ratings of one annotator each, or of all: the mean over criteria, which stay in a column."""
    lists = [(row.value or {})["ratings"] for row in rows]
    places = list(range(len(item.completions)))
    if by_item:
        names = list(lists[0][0])
        criteria = [{name: float(np.mean([of[place][name] for of in lists])) for name in names} for place in places]
        votes = [{"annotator": row.annotator, "ratings": (row.value or {})["ratings"], **_more(row)} for row in rows]
        yield _graded(item, item.id, places, "ratings", _means(criteria), {**_several(criteria), "votes": votes})
        return
    for row, given in zip(rows, lists, strict=True):
        more = {**_several(given), "annotator": row.annotator, **_more(row)}
        yield _graded(item, f"{item.id}:{row.annotator}", places, "ratings", _means(given), more)


def _means(ratings: Sequence[dict[str, float]]) -> list[float]:
    return [round(float(np.mean(list(of.values()))), 6) for of in ratings]


def _several(ratings: Sequence[dict[str, float]]) -> RowOut:
    """The ratings by criterion, if there are several criteria."""
    return {"criteria_ratings": list(ratings)} if len(ratings[0]) > 1 else {}


def _graded(item: Item, name: str, places: Sequence[int], key: str, grades: Sequence[Any], more: RowOut) -> RowOut:
    row = {"id": name, "prompt": item.prompt, "completions": [item.completions[place] for place in places], key: grades}
    policies = item.columns.get("policies")
    if isinstance(policies, list) and len(policies) > max(item.places):
        row["policies"] = [policies[item.places[place]] for place in places]
    return {**_columns(item, row), **row, **more}


def _columns(item: Item, row: RowOut) -> RowOut:
    """The candidate row's other columns; `policies` only if its order is known.

    A column that says how to train (`preference`, `margin`, `ranks`, ...) is of an earlier judgement, so it becomes
    ``input_NAME``, as does one that has the name of a column of ours.
    """
    others = {key: value for key, value in item.columns.items() if key != "policies"}
    names = free_names(others, {*row, *_OURS, *KEYS} - {"tools"})  # tools belong to the prompt
    return {names[key]: value for key, value in others.items()}


def _usable(row: RowOut, found: Exported) -> bool:
    """Whether a row compares anything."""
    if len(row["completions"]) >= 2:
        return True
    found.left_out["rows with fewer than two graded answers"] += 1
    return False
