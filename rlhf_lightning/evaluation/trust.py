"""``python -m rlhf_lightning agreement``: whether people agree, and in words what to do where they do not."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lightning import __version__
from rlhf_lightning.errors import CommandParser, InputError
from rlhf_lightning.evaluation.html_report import Interval, Report, Section, Table, write_report
from rlhf_lightning.outputs import check_output, write_whole
from rlhf_lightning.preferences.agreement import (
    FEW,
    LEVELS,
    alpha,
    alpha_interval,
    cohen_kappas,
    fleiss_kappa,
    people,
    raw_agreement,
    splits,
)
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Store, is_store
from rlhf_lightning.preferences.tasks import OVERALL, Task
from rlhf_lightning.preferences.units import Choice, Units, file_units, store_choices, store_units
from rlhf_lightning.text import notice, printable, say

# Krippendorff (2004, "Content Analysis", chapter 11): conclusions from 0.8, tentative ones from 0.667.
GOOD, ENOUGH = 0.8, 0.667
_LEAST = 0.7  # of gold items right, and of repeats judged the same
_Z = 2.58  # standard errors of a share that count as a bias: 1 in 100 by chance
_HARM = 0.03  # by how much alpha must rise without somebody


@dataclass(frozen=True)
class Source:
    """What was judged, from a store or a file."""

    name: str
    units: Units
    choices: list[Choice]
    judgements: list[Judgement]
    items: dict[str, Item]
    task: Task | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; raises an InputError if options or files are at fault."""
    parser = CommandParser(
        prog="python -m rlhf_lightning agreement",
        description="Measures whether people agree, and says in words what to do where they do not.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="STORE_OR_FILE", help="a store, or rows with preferences {annotator: 1 to 2}")
    parser.add_argument("--json", metavar="OUT", help="also write all numbers to this file")
    parser.add_argument("--report", metavar="DIR", help="also write report.html into this folder")
    options = parser.parse_args(argv)
    report = Path(options.report) / "report.html" if options.report else None
    if options.json:
        check_output(options.json, "--json", [options.source])
    if report is not None:
        check_output(report, "--report", [options.source])
    source = read(options.source)
    found = measured(source)
    _print(found)
    if options.json:
        write_whole(options.json, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if report is not None:
        write_report(_page(found), report)
        say(notice("report", str(report)))
    return 0


def read(path: str) -> Source:
    """The judgements of a store or of a file of rows with ``preferences``.

    Raises:
        InputError: there are none, or the file is at fault.
    """
    if not is_store(path):
        units, choices = file_units(path)
        return Source(path, units, choices, [], {}, None)
    with Store(path) as store:
        judgements, task = store.judgements(), store.task
        items = {item.id: item for _, item in store.items()}
    units = store_units(judgements, task)
    if not units.annotators:
        raise InputError(f"{path}: has no judgements of its real items yet; annotate first")
    return Source(path, units, store_choices(judgements, items, task), judgements, items, task)


def measured(source: Source) -> dict[str, Any]:
    """All numbers, as JSON values: see ``docs/preferences.md``."""
    units = source.units
    names = list(dict.fromkeys(units.criteria))
    whole = units.whole()
    fleiss, used = fleiss_kappa(whole)
    found: dict[str, Any] = {
        "source": source.name,
        "task": "pairs" if source.task is None else source.task.name,
        "items": len(set(units.items)),
        "judged_by_several": int(np.sum(np.sum(~np.isnan(whole.values), axis=0) >= 2)),
        "judgements": int(np.sum(~np.isnan(whole.values))),
        "alpha": _alphas(whole),
        "raw_agreement": _number(raw_agreement(whole)),
        "fleiss_kappa": {"value": _number(fleiss), "units": used},
        "cohen_kappa": {f"{a}, {b}": _number(value) for (a, b), value in cohen_kappas(whole).items()},
        "criteria": {name: _alphas(units.of_criterion(name)) for name in names} if len(names) > 1 else {},
        "annotators": people(whole, source.choices, source.judgements, source.items, source.task),
        "splits": splits(whole),
        "version": __version__,
    }
    found["advice"] = advice(found)
    return found


def advice(found: dict[str, Any]) -> list[str]:
    """What to do, the most pressing first; each a sentence or two."""
    value = found["alpha"]["nominal"]["value"]
    if len(found["annotators"]) < 2:
        return ["One person has judged so far. Agreement needs a second: ask again with --overlap 2."]
    if value is None:
        return ["No item was judged by two people. Ask again with --overlap 2."]
    said = [_overall(value)]
    for name, of in found["annotators"].items():
        said += _of_person(printable(name), of, value)
    if found["criteria"]:
        criteria = {name: of["nominal"]["value"] for name, of in found["criteria"].items()}
        known = {name: number for name, number in criteria.items() if number is not None and name != OVERALL}
        worst = min(known, key=known.__getitem__, default=None)
        if worst is not None and known[worst] < ENOUGH:
            said.append(
                f"Sharpen the guideline for {worst}: its alpha is {known[worst]:.2f}, the lowest of all criteria."
            )
    if found["splits"]:
        items = ", ".join(printable(row["item"]) for row in found["splits"][:5])
        said.append(f"People are split on {items}. Read them: ask again, or add what they teach to the guideline.")
    return said


def _overall(value: float) -> str:
    if value >= GOOD:
        return f"People agree well (nominal alpha {value:.2f}, at least {GOOD}). The judgements can be used."
    if value >= ENOUGH:
        return f"People agree enough for tentative conclusions (nominal alpha {value:.2f}, from {ENOUGH} to {GOOD})."
    return (
        f"People do not agree enough (nominal alpha {value:.2f}, below {ENOUGH}). Sharpen the guideline with examples "
        "of the items below and calibrate again. Until then use several votes for each item."
    )


def _of_person(name: str, of: dict[str, Any], value: float) -> list[str]:
    said = []
    without, gold, same = of["alpha_without"], of["gold"], of["self_agreement"]
    if without is not None and without - value >= _HARM:
        said.append(f"Recalibrate {name}: without them alpha rises from {value:.2f} to {without:.2f}.")
    if gold and gold["count"] >= FEW and gold["share"] < _LEAST:
        said.append(f"Recalibrate {name}: {gold['share']:.0%} of {gold['count']} hidden gold items were right.")
    if same and same["count"] >= FEW and same["share"] < _LEAST:
        text = f"agrees with themselves on {same['share']:.0%} of {same['count']} swapped repeats"
        said.append(f"{name} {text}. Ask for fewer items a day, or recalibrate.")
    for key, what in (("left", "the left answer"), ("longer", "the longer answer")):
        share = of[key]
        beyond = 0.0 if not share else (share["share"] - 0.5) * math.sqrt(share["count"]) / 0.5  # standard errors
        if share and share["count"] >= FEW and (beyond > _Z or (key == "left" and beyond < -_Z)):
            said.append(f"{name} chooses {what} in {share['share']:.0%} of {share['count']} choices. {_WHY[key]}")
    return said


_WHY = {
    "left": "Sides are random, so this is a habit: recalibrate.",
    "longer": "Longer can be better: compare with the others before you call it a bias.",
}


def _alphas(units: Units) -> dict[str, Any]:
    return {
        level: {
            "value": _number(alpha(units, level)),
            "interval": [_number(end) for end in alpha_interval(units, level)],
        }
        for level in LEVELS
    }


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    from rlhf_lightning.evaluation.present import terminal_table

    console = Console(highlight=False)
    say(f"{found['judgements']:,} judgements of {found['items']:,} items by {len(found['annotators'])} annotators")
    for table in _tables(found):
        console.print(terminal_table(table))
    for line in found["advice"]:
        say(notice("advice", line))


def _tables(found: dict[str, Any]) -> list[Table]:
    measures: list[list[Any]] = [[f"alpha, {level}", _cell(found["alpha"][level])] for level in LEVELS]
    measures += [["raw agreement", found["raw_agreement"]], ["Fleiss' kappa", found["fleiss_kappa"]["value"]]]
    tables = [Table(["measure", "value"], measures, "Agreement")]
    if found["criteria"]:
        rows = [[name, *(_cell(of[level]) for level in LEVELS)] for name, of in found["criteria"].items()]
        tables.append(Table(["criterion", *LEVELS], rows, "Alpha of each criterion"))
    people = found["annotators"]
    columns = {
        "judged": [of["judged"] for of in people.values()],
        "alpha without": [of["alpha_without"] for of in people.values()],
        "gold right": [of["gold"] and of["gold"]["share"] for of in people.values()],
        "same twice": [of["self_agreement"] and of["self_agreement"]["share"] for of in people.values()],
        "chose left": [of["left"] and of["left"]["share"] for of in people.values()],
        "chose longer": [of["longer"] and of["longer"]["share"] for of in people.values()],
        "seconds": [of["seconds"] for of in people.values()],
    }
    known = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    rows = [[printable(name), *cells] for name, *cells in zip(people, *known.values(), strict=True)]
    return [*tables, Table(["annotator", *known], rows, "Annotators")]


def _page(found: dict[str, Any]) -> Report:
    kappas = [[pair, value] for pair, value in found["cohen_kappa"].items()]
    split = [[printable(row["item"]), row["minority"], row["judgements"]] for row in found["splits"]]
    agreement, *others = _tables(found)
    sections = [
        Section(
            "Agreement",
            "Alpha is 1 where all agree always and 0 where they agree as chance would. Nominal reads judgements "
            "as words, ordinal as an order, interval as numbers. Intervals are 95% bootstrap intervals over items.",
            [agreement, *(table for table in others if table.title != "Annotators")],
        ),
        Section("Annotators", "A dash stands where nothing was asked that could tell.", [others[-1]]),
    ]
    if kappas:
        sections.append(Section("Each two people", "", [Table(["annotators", "Cohen's kappa"], kappas)]))
    if split:
        head = ["item", "share against the majority", "judgements"]
        sections.append(Section("Items that split people", "", [Table(head, split)]))
    first, *more = found["advice"]
    return Report(
        "Do people agree?",
        "\n\n".join([first, *more]),
        sections,
        provenance={"source": str(found["source"]), "rlhf_lightning": found["version"]},
    )


def _cell(measure: dict[str, Any]) -> Interval | str | float | None:
    value, (low, high) = measure["value"], measure["interval"]
    if value is None or low is None:
        return value
    # The bar of an interval begins at 0.
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if low < 0 else Interval(value, low, high)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
