"""The agreement command: its numbers, its words, its report, and what it refuses."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from studies import judged, store, write

from rlhf_lightning.cli.commands import main
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.trust import advice, measured, read
from rlhf_lightning.preferences.agreement import live
from rlhf_lightning.preferences.store import Store


def rows(count: int, seed: int = 0) -> list[dict]:
    """Two people who mostly agree, and one who answers at random and likes long answers."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        truth = draw.choice((1, 2))
        a, b = draw.choice((("long" * 5, "short"), ("short", "long" * 5)))
        given = {name: truth if draw.random() < 0.95 else 3 - truth for name in ("ann", "bob")}
        found.append({"response_a": a, "response_b": b, "preferences": {**given, "eve": 1 if len(a) > len(b) else 2}})
    return found


def test_numbers_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.jsonl", rows(200))
    assert main(["agreement", str(path), "--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "r")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["alpha"]) == {"nominal", "ordinal", "interval"}
    for of in found["alpha"].values():
        low, high = of["interval"]
        assert low < of["value"] < high
    assert found["alpha"]["nominal"]["value"] < 0.5
    assert found["annotators"]["eve"]["alpha_without"] > 0.75
    assert found["annotators"]["eve"]["longer"] == {"share": 1.0, "count": 200}
    assert found["cohen_kappa"]["ann, bob"] > 0.75
    said = " ".join(found["advice"])
    assert "People do not agree enough" in said
    assert "Recalibrate eve: without them alpha rises" in said
    assert "Recalibrate ann" not in said
    assert "eve chooses the longer answer in 100% of 200 choices" in said
    out = capsys.readouterr().out
    assert "600 judgements of 200 items by 3 annotators" in out
    assert "gold right" not in out  # nothing gives it
    page = (tmp_path / "r" / "report.html").read_text()
    assert "Recalibrate eve" in page
    assert "Items that split people" in page


def test_a_study_has_sides_gold_and_repeats(tmp_path: Path) -> None:
    names = [f"i{n}" for n in range(30)]
    found = store(tmp_path / "s.sqlite", names, criteria=("kind",))
    with Store(found, writing=True) as opened:
        draw = random.Random(1)
        judgements = []
        for n, name in enumerate(names):
            order = draw.choice(((0, 1), (1, 0)))
            kind = {"criteria": {"kind": draw.choice(("first", "second"))}}
            first = judged(f"a{n}", name, draw.choice(("first", "second")), "ann")
            always_left = judged(f"b{n}", name, ("first", "second")[order[0]], "bob")
            for row in (first, always_left):
                judgements.append(replace(row, shown=order, value={**(row.value or {}), **kind}))
            judgements.append(
                replace(judged(f"r{n}", name, ("first", "second")[order[1]], "bob", part="repeat"), shown=order[::-1])
            )
        opened.add(judgements)
    numbers = measured(read(str(found)))
    assert numbers["annotators"]["bob"]["left"] == {"share": 1.0, "count": 30}
    assert numbers["annotators"]["bob"]["self_agreement"] == {"share": 0.0, "count": 30}
    assert numbers["criteria"]["kind"]["nominal"]["value"] == 1.0
    assert numbers["criteria"]["overall"] == numbers["alpha"]
    said = " ".join(numbers["advice"])
    assert "bob chooses the left answer in 100% of 30 choices" in said
    assert "bob agrees with themselves on 0% of 30 swapped repeats" in said


def test_nobody_is_blamed_for_what_others_say_of_few_items(tmp_path: Path) -> None:
    """Without eve two people are left, who have judged nine items in common, or ten."""
    for common in (9, 10):
        given = [{"preferences": {"ann": 1 + n % 2, "bob": 1 + n % 2, "eve": 2 - n % 2}} for n in range(common)]
        given += [{"preferences": {"ann": 1, "eve": 2}}] * 20
        found = measured(read(str(write(tmp_path / "p.jsonl", given))))
        assert found["annotators"]["eve"]["alpha_without"] == (None if common == 9 else 1.0)
        assert any("Recalibrate eve" in line for line in found["advice"]) == (common == 10)


def test_one_person_is_told_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"preferences": {"ann": 1}}])
    found = measured(read(str(path)))
    assert found["alpha"]["nominal"] == {"value": None, "interval": [None, None]}
    assert found["advice"] == ["One person has judged so far. Agreement needs a second: ask again with --overlap 2."]
    path = write(tmp_path / "p.jsonl", [{"preferences": {"ann": 1}}, {"preferences": {"bob": 1}}])
    assert measured(read(str(path)))["advice"] == ["No item was judged by two people. Ask again with --overlap 2."]


def test_criteria_of_different_scales_are_not_pooled(tmp_path: Path) -> None:
    """Two people rate at random, one criterion low and the other high: pooled, that would look like agreement."""
    draw = random.Random(0)
    names = [f"i{n}" for n in range(60)]
    path = store(tmp_path / "s.sqlite", names, task="rating", criteria=("helpful", "harmless"))
    with Store(path, writing=True) as opened:
        rows = []
        for name in names:
            for who in ("ann", "bob"):
                given = {
                    "ratings": [{"helpful": draw.choice((1, 2)), "harmless": draw.choice((4, 5))} for _ in range(2)]
                }
                rows.append(replace(judged(f"{who}{name}", name, annotator=who), value=given))
        opened.add(rows)
        shown = live(list(opened.items()), opened.judgements(), opened.task)
    found = measured(read(str(path)))
    assert found["alpha"]["interval"]["value"] < 0.3
    assert set(found["criteria"]) == {"helpful", "harmless", "overall"}
    assert shown["alpha"]["interval"]["value"] == found["alpha"]["interval"]["value"]


def test_rows_need_ids_of_their_own(tmp_path: Path) -> None:
    given = [{"id": "x", "preferences": {"a": 1}}, {"id": "x", "preferences": {"a": 2}}]
    with pytest.raises(InputError, match=r"p\.jsonl:2: key 'id': is 'x' as in .*p\.jsonl:1"):
        read(str(write(tmp_path / "p.jsonl", given)))
    given = [{"id": None, "preferences": {"a": 1}}, {"id": "2", "preferences": {"a": 2}}, {"preferences": {"a": 2}}]
    assert measured(read(str(write(tmp_path / "p.jsonl", given))))["judgements"] == 3


def test_all_the_same_is_agreement(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"preferences": {"ann": 1, "bob": 1}}] * 3)
    found = measured(read(str(path)))
    assert found["alpha"]["nominal"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert found["advice"][0].startswith("People agree well (nominal alpha 1.00")


def test_the_criterion_with_the_lowest_alpha_is_named() -> None:
    level = lambda value: {"nominal": {"value": value}}  # noqa: E731
    person = dict.fromkeys(("alpha_without", "gold", "self_agreement", "left", "longer"))
    found = {
        "alpha": level(0.9),
        "annotators": {"a": person, "b": person},
        "criteria": {"kind": level(0.5), "true": level(0.2), "overall": level(0.1)},
        "splits": [],
    }
    assert advice(found)[1] == "Sharpen the guideline for true: its alpha is 0.20, the lowest of all criteria."


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.jsonl"], "none.jsonl: cannot be read (No such file"),
        (["STORE"], "has no judgements of its real items yet; annotate first"),
        (["p.jsonl", "--json", "p.jsonl"], "this command reads it"),
        (["p.jsonl", "--jsno", "x"], "did you mean --json"),
        (["torn.sqlite"], "cannot be read as a store"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "STORE", ["i"])
    write(tmp_path / "p.jsonl", rows(3))
    (tmp_path / "torn.sqlite").write_bytes(b"SQLite format 3\0" + b"\1" * 200)
    assert main(["agreement", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
