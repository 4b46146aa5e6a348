"""Measures whether people agree: Krippendorff's alpha, kappas, raw agreement, and what is particular to each person.

Alpha is 1 if all agree always and 0 if they agree as chance would have it. Its three levels read the judgements as
words (nominal), as an order (ordinal), or as numbers (interval).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Part
from rlhf_lightning.preferences.tasks import Task
from rlhf_lightning.preferences.units import Choice, Numbers, Units, store_choices, store_units

Level = Literal["nominal", "ordinal", "interval"]
LEVELS: tuple[Level, ...] = get_args(Level)
FEW = 10  # outcomes from which a number says something about a person
_MANY = 50  # different values


def alpha(units: Units, level: Level) -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's Alpha-Reliability"), by the `krippendorff` library.

    The library compares every two values that occur, which takes half a minute for 1,500 different ones. Above `_MANY`
    the sums of `alpha_interval` are used, which give the same number.

    Returns: NaN if no unit was judged by two people. 1 if all gave one and the same value, for which alpha is not
    defined, since nothing could differ.
    """
    check_choice("level", level, Level)
    try:
        import krippendorff
    except ImportError:
        raise InputError("agreement needs krippendorff; run: pip install 'rlhf-lightning[annotate]'") from None
    table = _table(units, level)
    table = table[:, np.sum(~np.isnan(table), axis=0) >= 2]
    if table.size == 0:
        return math.nan
    different = len(np.unique(table[~np.isnan(table)]))
    if different == 1:
        return 1.0
    if different > _MANY:
        return _weighted_alpha(table, np.ones(table.shape[1]), level)
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))


def alpha_interval(units: Units, level: Level, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of alpha, over items (Efron 1979). NaN if alpha is not defined.

    All samples are computed at once, from sums over the units. Nominal and interval disagreements are sums already;
    ordinal alpha is interval alpha of the values' mid-ranks, since the ordinal difference of two values is the number
    of values between them.
    """
    check_choice("level", level, Level)
    table = _table(units, level)
    used = np.sum(~np.isnan(table), axis=0) >= 2
    if not used.any():
        return math.nan, math.nan
    table = table[:, used]
    names, place = np.unique([item for item, of in zip(units.items, used, strict=True) if of], return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=samples)
    found = [_weighted_alpha(table, weights[place].astype(float), level) for weights in draws]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def raw_agreement(units: Units) -> float:
    """The share of pairs of judgements of one unit that are the same; NaN if there are none."""
    same = total = 0.0
    for column in units.categories.T:
        marks = column[~np.isnan(column)]
        counts = np.unique(marks, return_counts=True)[1]
        same += float(np.sum(counts * (counts - 1)))
        total += len(marks) * (len(marks) - 1)
    return same / total if total else math.nan


def cohen_kappas(units: Units) -> dict[tuple[str, str], float]:
    """Cohen's kappa (1960) of each two people who judged two units or more in common."""
    import torch
    from torchmetrics.functional.classification import multiclass_cohen_kappa

    found = {}
    coded, count = _coded(units)
    for a, b in combinations(range(len(units.annotators)), 2):
        both = (coded[a] >= 0) & (coded[b] >= 0)
        if both.sum() >= 2 and count > 1:
            one, other = (torch.from_numpy(coded[person][both]) for person in (a, b))
            kappa = float(multiclass_cohen_kappa(one, other, num_classes=count))
            found[units.annotators[a], units.annotators[b]] = kappa
    return found


def fleiss_kappa(units: Units) -> tuple[float, int]:
    """Fleiss' kappa (1971) and the number of units it is of: those with the most common number of judgements.

    It is defined for one number of judgements of each unit. NaN if there is no such unit.
    """
    import torch
    from torchmetrics.functional.nominal import fleiss_kappa as kappa

    coded, count = _coded(units)
    given = np.sum(coded >= 0, axis=0)
    several = given[given >= 2]
    if not len(several) or count < 2:
        return math.nan, 0
    most = int(np.bincount(several).argmax())
    table = [np.bincount(column[column >= 0], minlength=count) for column in coded.T[given == most]]
    counts = np.stack(table)
    if np.sum(counts.sum(axis=0) > 0) < 2:  # one category only: nothing could differ by chance
        return math.nan, len(table)
    return float(kappa(torch.from_numpy(counts), mode="counts")), len(table)


def splits(units: Units, most: int = 10) -> list[dict[str, Any]]:
    """The items on which people differ most: first those whose judgements are furthest from being one."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for place, item in enumerate(units.items):
        marks = units.categories[:, place]
        marks = marks[~np.isnan(marks)]
        if len(marks) >= 2:
            counts = np.unique(marks, return_counts=True)[1]
            values = units.values[:, place]
            found.setdefault(item, []).append((1 - counts.max() / len(marks), float(np.nanvar(values)), len(marks)))
    rows = [(item, [float(np.mean(column)) for column in zip(*of, strict=True)]) for item, of in found.items()]
    rows.sort(key=lambda row: (-row[1][0], -row[1][1]))
    return [
        {"item": item, "minority": minority, "judgements": round(count)}
        for item, (minority, _, count) in rows[:most]
        if minority > 0
    ]


def people(
    units: Units, choices: Sequence[Choice], judgements: Iterable[Judgement], items: dict[str, Item], task: Task | None
) -> dict[str, dict[str, Any]]:
    """What is particular to each annotator. Shares are None where nothing gives them.

    Returns: for each name ``judged``, ``alpha_without`` (nominal, of all others; None if they have fewer than `FEW`
    units in common), ``agreement`` (share of judgements that others of the same unit share), ``left`` and ``longer``
    (how often the left or the longer answer was chosen: share, count), ``self_agreement`` (on swapped repeats),
    ``gold`` (hidden gold items), and ``seconds`` (median).
    """
    rows = [row for row in judgements if row.value is not None]
    names = sorted({*units.annotators, *(row.annotator for row in rows)})
    found = {}
    for name in names:
        left, longer = _habits(name, choices)
        place = units.annotators.index(name) if name in units.annotators else None
        others = [other for other in range(len(units.annotators)) if other != place]
        own = [row for row in rows if row.annotator == name]
        found[name] = {
            "judged": 0 if place is None else int(np.sum(~np.isnan(units.values[place]))),
            "alpha_without": _number(_alpha_of(units, others)),
            "agreement": None if place is None else _shared(units, place),
            "left": left,
            "longer": longer,
            **_checks(own, items, task),
            "seconds": _median([row.seconds for row in own if row.seconds is not None]),
        }
    return found


def _alpha_of(units: Units, annotators: Sequence[int]) -> float:
    """Nominal alpha of some annotators; NaN if they judged fewer than `FEW` units in common."""
    chosen = units.chosen(range(len(units.items)), annotators)
    common = np.sum(np.sum(~np.isnan(chosen.categories), axis=0) >= 2)
    return alpha(chosen, "nominal") if common >= FEW else math.nan


def live(items: Sequence[tuple[Part, Item]], judgements: Sequence[Judgement], task: Task) -> dict[str, Any]:
    """What the lead's page shows while a study runs: alpha with the number of items it is of, and each annotator."""
    units = store_units(judgements, task).whole()
    several = np.sum(~np.isnan(units.values), axis=0) >= 2
    count = len({item for item, of in zip(units.items, several, strict=True) if of})
    by_id = {item.id: item for _, item in items}
    choices = store_choices(judgements, by_id, task)
    given: dict[str, list[Judgement]] = {}
    for row in judgements:
        if row.value is not None:
            given.setdefault(row.annotator, []).append(row)
    shown = {}
    for name, own in sorted(given.items()):  # not `people`: alpha without each person takes too long for a page
        checks = _checks(own, by_id, task)
        left, _ = _habits(name, choices)
        shown[name] = {
            "seconds": _median([row.seconds for row in own if row.seconds is not None]),
            "gold_accuracy": checks["gold"] and checks["gold"]["share"],
            "self_agreement": checks["self_agreement"] and checks["self_agreement"]["share"],
            "left_share": left and left["share"],
        }
    levels = {level: {"value": _number(alpha(units, level)), "items": count} for level in LEVELS}
    return {"alpha": levels, "annotators": shown}


def _table(units: Units, level: Level) -> Numbers:
    return units.categories if level == "nominal" else units.values


def _coded(units: Units) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
    """The categories as 0, 1, ... and -1 for none, with their number."""
    known = np.unique(units.categories[~np.isnan(units.categories)])
    coded = np.searchsorted(known, units.categories)
    return np.where(np.isnan(units.categories), -1, coded).astype(np.int64), len(known)


def _weighted_alpha(table: Numbers, weights: Numbers, level: Level) -> float:
    """Alpha where each unit counts ``weights`` times: 1 - observed / expected disagreement."""
    there = ~np.isnan(table)
    counts = there.sum(axis=0)
    total = float(np.sum(weights * counts))
    if level == "nominal":
        marks = np.unique(table[there])
        of = np.stack([np.sum(table == mark, axis=0) for mark in marks])  # [marks, U]
        observed = np.sum(weights * (counts**2 - np.sum(of**2, axis=0)) / (counts - 1))
        expected = total**2 - np.sum((of @ weights) ** 2)
    else:
        if level == "ordinal":
            table = _mid_ranks(table, weights)
        center = np.nanmean(table)  # keeps the sums of squares exact
        first, second = np.nansum(table - center, axis=0), np.nansum((table - center) ** 2, axis=0)
        observed = np.sum(weights * 2 * (counts * second - first**2) / (counts - 1))
        expected = 2 * (total * np.sum(weights * second) - np.sum(weights * first) ** 2)
    if expected <= 0:
        return 1.0  # one value only, as in `alpha`
    return float(1 - (total - 1) * observed / expected)


def _mid_ranks(table: Numbers, weights: Numbers) -> Numbers:
    there = ~np.isnan(table)
    known, place = np.unique(table[there], return_inverse=True)
    of = np.bincount(place, weights=np.broadcast_to(weights, table.shape)[there], minlength=len(known))
    ranks = np.cumsum(of) - of / 2
    found = np.full(table.shape, np.nan)
    found[there] = ranks[place]
    return found


def _shared(units: Units, place: int) -> float | None:
    mine = units.categories[place]
    others = np.delete(units.categories, place, axis=0)
    known = ~np.isnan(others) & ~np.isnan(mine)
    return float(np.sum((others == mine) & known) / np.sum(known)) if known.any() else None


def _habits(name: str, choices: Sequence[Choice]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """How often someone chose the left answer, and the longer one."""
    mine = [choice for choice in choices if choice.annotator == name]
    left = [choice.second == bool(choice.left) for choice in mine if choice.left is not None]
    longer = [choice.second == (b > a) for choice in mine for a, b in [choice.lengths] if a != b]
    return _share(left), _share(longer)


def _checks(rows: Sequence[Judgement], items: dict[str, Item], task: Task | None) -> dict[str, Any]:
    """Agreement with oneself on repeats, and with hidden gold."""
    if task is None:
        return {"self_agreement": None, "gold": None}
    first = {row.item: row.value for row in rows if row.part == "real"}
    repeats = [(row.value, first[row.item]) for row in rows if row.part == "repeat" and row.item in first]
    gold = [(row.value, items[row.item].gold) for row in rows if row.part == "gold"]
    return {
        "self_agreement": _share([task.agrees(value or {}, before or {}) for value, before in repeats]),
        "gold": _share([task.agrees(value or {}, right) for value, right in gold]),
    }


def _share(outcomes: Sequence[bool]) -> dict[str, Any] | None:
    return {"share": sum(outcomes) / len(outcomes), "count": len(outcomes)} if outcomes else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
