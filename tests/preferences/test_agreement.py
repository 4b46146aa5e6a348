"""Agreement against published worked examples, the reference library, and cases that can be counted by hand."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import krippendorff
import numpy as np
import pytest
from studies import item, judged

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.agreement import (
    LEVELS,
    _weighted_alpha,
    alpha,
    alpha_interval,
    cohen_kappas,
    fleiss_kappa,
    live,
    people,
    raw_agreement,
    splits,
)
from rlhf_lightning.preferences.tasks import OVERALL, Pairs, Ranking, Rating
from rlhf_lightning.preferences.units import Mark, Units, file_units, store_choices, store_units

NONE = math.nan


def units(*rows: list[float]) -> Units:
    """One row an annotator, one column a unit."""
    table = np.array(rows, dtype=float)
    names = tuple(f"a{n}" for n in range(len(table)))
    return Units(names, tuple(f"i{n}" for n in range(table.shape[1])), (OVERALL,) * table.shape[1], table, table)


# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section C: 4 observers, 12 units.
PUBLISHED = units(
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
)


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level: str, expected: float) -> None:
    assert alpha(PUBLISHED, level) == pytest.approx(expected, abs=5e-4)


def test_alpha_where_it_is_not_defined() -> None:
    assert math.isnan(alpha(units([1, 2, 1]), "nominal"))
    assert math.isnan(alpha(units([1, NONE], [NONE, 2]), "nominal"))
    assert alpha(units([1, 1], [1, 1]), "interval") == 1.0
    with pytest.raises(InputError, match="level: expected nominal, ordinal or interval"):
        alpha(PUBLISHED, "ratio")


@pytest.mark.parametrize("level", LEVELS)
def test_the_alpha_of_bootstrap_samples_is_that_of_the_library(level: str) -> None:
    """Units that count several times are the same as units that stand several times in the table."""
    draw = np.random.default_rng(3)
    for _ in range(5):
        table = draw.choice([1.0, 1.25, 1.5, 2.0, NONE], size=(4, 30), p=[0.3, 0.1, 0.1, 0.3, 0.2])
        table = table[:, np.sum(~np.isnan(table), axis=0) >= 2]
        weights = draw.integers(0, 4, table.shape[1])
        expected = krippendorff.alpha(np.repeat(table, weights, axis=1), level_of_measurement=level)
        assert _weighted_alpha(table, weights.astype(float), level) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_many_different_values_have_the_librarys_alpha(level: str) -> None:
    table = np.random.default_rng(4).normal(size=(3, 40)) + np.linspace(0, 3, 40)
    expected = krippendorff.alpha(table, level_of_measurement=level)
    assert alpha(units(*table.tolist()), level) == pytest.approx(expected, abs=1e-12)


def test_the_interval_is_over_items_and_holds_the_value() -> None:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 2, 200)
    noisy = [np.where(draw.random(200) < 0.85, truth, 1 - truth).astype(float).tolist() for _ in range(3)]
    found = units(*noisy)
    low, high = alpha_interval(found, "nominal")
    assert low < alpha(found, "nominal") < high
    assert 0.1 < high - low < 0.25
    assert alpha_interval(found, "nominal") == (low, high)
    # The same judgements of 20 items with ten units each: they are less to go by.
    clustered = Units(
        found.annotators, tuple(f"i{n // 10}" for n in range(200)), found.criteria, found.values, found.values
    )
    assert alpha_interval(clustered, "nominal") != (low, high)
    assert all(math.isnan(end) for end in alpha_interval(units([1, 2]), "nominal"))


def test_fleiss_kappa_of_the_published_example() -> None:
    """Fleiss' kappa of 14 raters, 10 subjects and 5 categories: 0.210."""
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    columns = [[category for category, n in enumerate(row) for _ in range(n)] for row in counts]
    kappa, used = fleiss_kappa(units(*np.array(columns, dtype=float).T.tolist()))
    assert (round(kappa, 3), used) == (0.210, 10)


def test_cohen_kappa_of_a_worked_example() -> None:
    """50 applications, of which two readers grant 20 both, 15 neither, 5 one, 10 the other: 0.4."""
    first = [1.0] * 25 + [0.0] * 25
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert cohen_kappas(units(first, second)) == {("a0", "a1"): pytest.approx(0.4, abs=1e-6)}


def test_raw_agreement_by_hand() -> None:
    # Pairs of judgements: unit 0 has 3 (1 same), unit 1 has 1 (same), unit 2 none.
    assert raw_agreement(units([1, 2, NONE], [1, 2, 3], [2, NONE, NONE])) == pytest.approx(2 / 4)
    assert math.isnan(raw_agreement(units([1, 2])))


def test_items_that_split_people_come_first() -> None:
    found = splits(units([1, 1, 1], [1, 2, 1], [1, 2, 1], [1, 1, 2]))
    assert [(row["item"], row["minority"]) for row in found] == [("i1", 0.5), ("i2", 0.25)]


def test_values_of_a_study() -> None:
    rows = [
        judged("1", "i", "first", "a"),
        judged("2", "i", "both_bad", "b"),
        judged("3", "i", "second", "c"),
        judged("4", "i", "second", "a", part="repeat"),
    ]
    strong = {"choice": "second", "strength": 3, "criteria": {"kind": "first"}}
    rows[2] = type(rows[2])(**{**rows[2].__dict__, "value": strong})
    found = store_units(rows, Pairs(["kind"]))
    assert found.annotators == ("a", "b", "c")
    assert found.of_criterion(OVERALL).values[:, 0].tolist() == [-2, 0, 3]
    assert found.of_criterion(OVERALL).categories[:, 0].tolist() == [-1, 0, 1]
    assert found.of_criterion("kind").values[:, 0].tolist()[2] == -1
    ranking = type(rows[0])(**{**rows[0].__dict__, "value": {"ranks": [2, 1, None, 2]}})
    table = store_units([ranking], Ranking())
    assert table.values[0].tolist() == [1, 0, -1]  # 0-1, 0-3, 1-3
    rating = type(rows[0])(**{**rows[0].__dict__, "value": {"ratings": [{"x": 2, "y": 5}]}})
    rated = store_units([rating], Rating(["x", "y"]))
    assert rated.values[0].tolist() == [2, 5, 3.5]  # each criterion, and their mean as the whole
    assert rated.whole().values[0].tolist() == [3.5]
    one = type(rows[0])(**{**rows[0].__dict__, "value": {"ratings": [{"x": 2}]}})
    assert store_units([one], Rating(["x"])).whole().values[0].tolist() == [2]


def test_rows_with_preferences(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"response_a": "long answer", "response_b": "short", "preferences": {"x": 1, "y": 1.8, "z": 1.5}}\n'
        '{"response_a": "a", "response_b": "b", "preferences": {"x": 1.49, "y": null}}\n'
    )
    found, choices = file_units(str(path))
    assert found.annotators == ("x", "y", "z")
    assert found.values[:, 0].tolist() == [1, 1.8, 1.5]
    assert found.categories[:2, 0].tolist() == [1, 2]
    assert math.isnan(found.categories[2, 0])
    assert [(choice.annotator, choice.second, choice.lengths) for choice in choices] == [
        ("x", False, (11, 5)),
        ("y", True, (11, 5)),
        ("x", False, (1, 1)),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"preferences": {"x": 3}}', r"p\.jsonl:1: key 'preferences\.x': must be from 1 .* got 3"),
        ('{"preferences": {"x": "a"}}', r"key 'preferences\.x': must be a number, got text"),
        ('{"preferences": [1]}', r"key 'preferences': must be an object, got a list"),
        ('{"prompt": "q"}', r"key 'preferences': must be an object, got null"),
        ('{"preferences": {}}', r"p\.jsonl: holds no judgements"),
    ],
)
def test_faulty_rows_with_preferences_are_one_line(tmp_path, row: str, expected: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(InputError, match=expected):
        file_units(str(path))


def test_what_is_particular_to_each_person() -> None:
    items = {name: item(name) for name in ("i0", "i1", "i2", "i3")}
    items["g"] = item("g", gold={"choice": "first", "strength": None})
    rows = [
        *(judged(f"a{n}", f"i{n}", "first", "ann", seconds=float(n)) for n in range(4)),
        judged("a4", "i0", "second", "ann", part="repeat"),
        judged("a5", "i1", "first", "ann", part="repeat"),
        judged("a6", "g", "second", "ann", part="gold"),
        *(judged(f"b{n}", f"i{n}", "second" if n else "first", "bob") for n in range(2)),
    ]
    swapped = [type(row)(**{**row.__dict__, "shown": (1, 0)}) if row.item == "i3" else row for row in rows]
    table = store_units(swapped, Pairs())
    found = people(table, store_choices(swapped, items, Pairs()), swapped, items, Pairs())
    ann = found["ann"]
    assert ann["judged"] == 4
    assert ann["left"] == {"share": 0.75, "count": 4}  # the first answer was shown right once
    assert ann["self_agreement"] == {"share": 0.5, "count": 2}
    assert ann["gold"] == {"share": 0.0, "count": 1}
    assert ann["agreement"] == 0.5
    assert ann["seconds"] == 1.5
    assert found["bob"]["gold"] is None
    shown = live([("real", one) for one in items.values()], swapped, Pairs())
    assert shown["alpha"]["nominal"]["items"] == 2
    assert shown["annotators"]["ann"] == {
        "seconds": 1.5,
        "gold_accuracy": 0.0,
        "self_agreement": 0.5,
        "left_share": 0.75,
    }


def test_longer_answers() -> None:
    table, choices = Units.of([Mark(("i", OVERALL, ""), "a", 1, 1)]), []
    for second, lengths in ((True, (1, 2)), (True, (2, 1)), (False, (2, 1)), (True, (1, 1))):
        choices.append(type("Choice", (), {"annotator": "a", "second": second, "left": None, "lengths": lengths})())
    found = people(table, choices, [], {}, None)["a"]
    assert found["longer"] == {"share": 2 / 3, "count": 3}
    assert found["left"] is None


def test_the_leads_page_is_quick() -> None:
    """5,000 rankings of four answers by 50 people, the largest that the page must show at once."""
    generator = np.random.default_rng(0)
    items = [("real", item(f"i{n}", 4)) for n in range(1000)]
    rows = [
        replace(
            judged(f"{n}", f"i{n // 5}", annotator=f"a{n % 50}"), value={"ranks": generator.permutation(4).tolist()}
        )
        for n in range(5000)
    ]
    taken = []
    for _ in range(3):
        start = time.process_time()
        live(items, rows, Ranking())
        taken.append(time.process_time() - start)
    assert min(taken) < 0.25  # some 0.1 s; 0.47 s if alpha without each person were computed too
