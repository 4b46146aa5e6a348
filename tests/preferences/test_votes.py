"""From judgements to rows: the votes by hand, nothing lost, and rows that fit and other libraries read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from studies import judged, store, write

from rlhf_lightning.cli.commands import main
from rlhf_lightning.data.records import load_records
from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.exchange import formed
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Store
from rlhf_lightning.preferences.votes import export

CHOICES = {
    "i0": "first first second",
    "i1": "second tie second",
    "i2": "first second both_bad",
    "i3": "second",
    "i4": "",
}


def filled(path: Path, extra: list[Judgement] = [], criteria: tuple[str, ...] = ()) -> Store:  # noqa: B006
    """A store of pairs, each judged as `CHOICES` says by a0, a1, ..."""
    opened = Store(store(path, CHOICES, criteria=criteria), writing=True)
    rows = [
        judged(f"{name}-{n}", name, choice, f"a{n}", seconds=1.0 + n)
        for name, choices in CHOICES.items()
        for n, choice in enumerate(choices.split())
    ]
    opened.add([*rows, *extra])
    return opened


def test_soft_votes(tmp_path: Path) -> None:
    with filled(tmp_path / "s.sqlite") as opened:
        found = export(opened, "soft")
    assert [(row["id"], row["chosen"], row["preference"], row["agreement"]) for row in found.rows] == [
        ("i0", "i0 0", round(2 / 3, 6), round(2 / 3, 6)),
        ("i1", "i1 1", round(2.5 / 3, 6), round(2 / 3, 6)),
        ("i2", "i2 0", 0.5, round(1 / 3, 6)),
        ("i3", "i3 1", 1.0, 1.0),
    ]
    assert found.summary() == "4 rows; left out: 1 items that nobody judged"
    assert found.rows[1]["rejected"] == "i1 0"


def test_majority_votes(tmp_path: Path) -> None:
    skip = replace(judged("k", "i4"), value=None)
    gold = [judged("r", "i0", part="repeat"), skip]
    with filled(tmp_path / "s.sqlite", gold) as opened:
        found = export(opened, "majority", min_votes=2)
    assert [(row["id"], row["chosen"]) for row in found.rows] == [("i0", "i0 0"), ("i1", "i1 1")]
    assert "preference" not in found.rows[0]
    assert dict(found.left_out) == {
        "judgements of repeats": 1,
        "skipped judgements": 1,
        "items that nobody judged": 1,
        "items with fewer than 2 votes": 1,
        "items without a majority": 1,
    }


def test_ties_and_bad_answers(tmp_path: Path) -> None:
    names = {"tied": "tie both_bad", "bad": "both_bad both_bad", "mixed": "first both_bad"}
    with Store(store(tmp_path / "s.sqlite", names), writing=True) as opened:
        opened.add([judged(f"{n}{a}", n, c, f"a{a}") for n, of in names.items() for a, c in enumerate(of.split())])
        soft, majority, model = (export(opened, votes) for votes in ("soft", "majority", "dawid_skene"))
    assert [(row["id"], row["preference"], row.get("tie")) for row in soft.rows] == [
        ("tied", 0.5, True),
        ("mixed", 0.75, None),
    ]
    assert [row["id"] for row in majority.rows] == ["mixed"]
    assert majority.left_out["items without a majority"] == 1
    assert [(row["id"], row.get("tie")) for row in model.rows] == [("tied", True), ("mixed", None)]
    for found in (soft, majority, model):
        assert found.left_out["items whose answers are both bad to everyone"] == 1
        assert "4 votes say that both answers are bad; beside other votes they count as ties" in found.notes


def test_the_margin_is_the_mean_strength_of_the_votes_for_chosen(tmp_path: Path) -> None:
    given = [("first", 3), ("first", 2), ("first", None), ("second", 1), ("tie", None)]
    with Store(store(tmp_path / "s.sqlite", ["i"]), writing=True) as opened:
        opened.add(
            [
                replace(judged(f"{n}", "i", annotator=f"a{n}"), value={"choice": choice, "strength": strength})
                for n, (choice, strength) in enumerate(given)
            ]
        )
        [row], [soft] = export(opened, "majority").rows, export(opened, "soft").rows
    assert (row["chosen"], row["margin"]) == ("i 0", 2.5)
    assert "margin" not in soft


def test_what_is_no_vote_is_counted_by_its_kind(tmp_path: Path) -> None:
    rows = [
        replace(judged("1", "i3", annotator="b"), value=None),
        replace(judged("2", "i3", annotator="c", flag="broken"), value=None),
        judged("3", "i3", annotator="d", flag="odd"),
        judged("4", "i3", annotator="d", part="calibration"),
        judged("5", "i3", annotator="d", part="gold"),
        judged("6", "i3", annotator="d", part="repeat"),
    ]
    with filled(tmp_path / "s.sqlite", rows) as opened:
        found = export(opened, "soft")
    assert dict(found.left_out) == {
        "skipped judgements": 1,
        "flags without a judgement": 1,
        "judgements of calibration items": 1,
        "judgements of gold items": 1,
        "judgements of repeats": 1,
        "items that nobody judged": 1,
    }
    assert found.notes[0] == "1 votes have a flag; they count, and the flag stands in the row's votes"


def test_votes_of_the_model_believe_who_is_reliable(tmp_path: Path) -> None:
    names = [f"i{n}" for n in range(40)]
    with Store(store(tmp_path / "s.sqlite", names), writing=True) as opened:
        rows = []
        for n, name in enumerate(names):
            right, wrong = ("first", "second") if n % 2 else ("second", "first")
            rows += [judged(f"{name}-{a}", name, right, f"good{a}") for a in range(3)]
            rows += [judged(f"{name}-x", name, wrong if n % 3 == 0 else right, "noisy")]
        rows += [judged("last", "i0", "first", "more")]
        opened.add(rows)
        found = export(opened, "dawid_skene")
    assert all(row["preference"] > 0.9 for row in found.rows)
    assert "good0 " in found.notes[0]
    accuracy = dict(part.rsplit(" ", 1) for part in found.notes[0].partition(": ")[2].split(", "))
    assert float(accuracy["noisy"]) < 0.75 < 0.95 < float(accuracy["good1"])


def test_nothing_of_a_judgement_is_lost(tmp_path: Path) -> None:
    strong = {"choice": "second", "strength": 3, "criteria": {"kind": "first", "true": "tie"}}
    row = replace(judged("z", "i4", comment="hm", flag="odd", seconds=2.0), value=strong, shown=(1, 0))
    with filled(tmp_path / "s.sqlite", [row], ("kind", "true")) as opened:
        last = export(opened, "soft").rows[-1]
        at = opened.judgements()[-1].at
    assert last["criteria"] == {"kind": 0.0, "true": 0.5}
    assert last["votes"] == [
        {
            "annotator": "ann",
            "choice": "chosen",
            "strength": 3,
            "criteria": {"kind": "rejected", "true": "tie"},
            "left": "chosen",
            "seconds": 2.0,
            "comment": "hm",
            "flag": "odd",
            "at": at,
        }
    ]


def test_columns_of_the_candidates_stay_and_policies_follow_the_sides(tmp_path: Path) -> None:
    item = Item("r:0-2", "r", "q", ("x", "z"), (0, 2), {"policies": ["sft", "ppo", "dpo"], "topic": "t"})
    Store.create(tmp_path / "s.sqlite", {"task": "pairs", "criteria": []}, [("real", item)])
    with Store(tmp_path / "s.sqlite", writing=True) as opened:
        opened.add([judged("1", "r:0-2", "second")])
        [row] = export(opened, "majority").rows
    assert (row["chosen"], row["policies"], row["topic"]) == ("z", ["dpo", "sft"], "t")


def graded(path: Path, task: str, values: list[dict], criteria: tuple[str, ...] = ()) -> Store:
    """A store of one item with three answers, and one judgement of each annotator."""
    item = Item("i", "i", "q", ("x", "y", "z"), (0, 1, 2), {"policies": ["p", "q", "r"]})
    Store.create(path, {"task": task, "criteria": list(criteria)}, [("real", item)])
    opened = Store(path, writing=True)
    opened.add(
        [
            replace(judged(f"{n}", "i", annotator=f"a{n}"), value=value, shown=(2, 0, 1))
            for n, value in enumerate(values)
        ]
    )
    return opened


def test_rankings(tmp_path: Path) -> None:
    ranks = [{"ranks": [2, 1, 2]}, {"ranks": [1, 2, None]}]
    with graded(tmp_path / "s.sqlite", "ranking", ranks) as opened:
        soft, one = export(opened, "soft").rows, export(opened, "majority").rows
        with pytest.raises(InputError, match="--votes dawid_skene: is for pairs"):
            export(opened, "dawid_skene")
    assert [(row["id"], row["completions"], row["ranks"], row["policies"]) for row in soft] == [
        ("i:a0", ["x", "y", "z"], [2, 1, 2], ["p", "q", "r"]),
        ("i:a1", ["x", "y"], [1, 2], ["p", "q"]),
    ]
    assert [(row["completions"], row["ranks"]) for row in one] == [(["x", "y"], [1, 1])]
    assert [vote["ranks"] for vote in one[0]["votes"]] == [[2, 1, 2], [1, 2, None]]


def test_the_majority_of_partial_rankings_is_among_the_answers_that_all_have_ranked(tmp_path: Path) -> None:
    """Two of three prefer x to y. The ranks that the third gave other answers must not outweigh them."""
    ranks = [{"ranks": [1, 2, None]}, {"ranks": [1, 2, None]}, {"ranks": [3, 1, 2]}]
    with graded(tmp_path / "s.sqlite", "ranking", ranks) as opened:
        [row] = export(opened, "majority").rows
    assert (row["completions"], row["ranks"]) == (["x", "y"], [1, 2])


def test_what_an_earlier_file_said_of_training_does_not_turn_a_new_judgement_around(tmp_path: Path) -> None:
    columns = {"preference": 0.1, "margin": 2.0, "weight": 5, "ranks": [1, 2], "votes": [], "tie": True, "topic": "t"}
    item = Item("i", "i", "q", ("good", "bad"), (0, 1), columns)
    Store.create(tmp_path / "s.sqlite", {"task": "pairs", "criteria": []}, [("real", item)])
    with Store(tmp_path / "s.sqlite", writing=True) as opened:
        opened.add([judged("1", "i", "first")])
        for votes in ("majority", "soft"):
            [row] = export(opened, votes).rows
            assert (row["input_preference"], row["input_margin"], row["input_ranks"], row["topic"]) == (
                0.1,
                2.0,
                [1, 2],
                "t",
            )
            [record] = load_records(str(write(tmp_path / f"{votes}.jsonl", [row]))).rows
            assert (record.responses, record.preference, record.margin) == (("good", "bad"), 1.0, 0.0)
            assert record.weight == 1.0


def test_import_keeps_uncertain_labels(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [{**pair, "preference": p} for p in (0.6, 0.5, 0.2, 1)]
    out = tmp_path / "out.jsonl"
    assert main(["preferences", "import", str(write(tmp_path / "r.jsonl", rows)), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row.get("preference")) for row in found] == [
        ("a", 0.6),
        ("a", 0.5),
        ("b", 0.8),
        ("a", None),
    ]


@pytest.mark.parametrize("answer", ["yes\n\nHuman: and now?", "no\n\nAssistant: yes"])
def test_a_text_that_holds_a_turn_is_no_transcript(answer: str) -> None:
    with pytest.raises(InputError, match="would begin another turn"):
        formed({"id": "i", "prompt": "q", "chosen": answer, "rejected": "b"}, "hh")
    with pytest.raises(InputError, match="would begin another turn"):
        formed({"id": "i", "prompt": answer, "chosen": "a", "rejected": "b"}, "hh")


def test_ratings(tmp_path: Path) -> None:
    values = [{"ratings": [{"k": 1, "t": 2}, {"k": 5, "t": 5}, {"k": 3, "t": 3}]}, {"ratings": [{"k": 3, "t": 2}] * 3}]
    with graded(tmp_path / "s.sqlite", "rating", values, ("k", "t")) as opened:
        soft, one = export(opened, "soft").rows, export(opened, "majority").rows
    assert [row["ratings"] for row in soft] == [[1.5, 5, 3], [2.5, 2.5, 2.5]]
    assert soft[0]["criteria_ratings"][0] == {"k": 1, "t": 2}
    assert one[0]["ratings"] == [2, 3.75, 2.75]
    assert one[0]["criteria_ratings"][0] == {"k": 2, "t": 2}


def test_the_command_writes_rows_that_fit_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "s.sqlite").close()
    out = tmp_path / "prefs.jsonl"
    command = ["preferences", "export", str(tmp_path / "s.sqlite"), "--out", str(out), "--votes", "majority"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 rows; left out: 1 items that nobody judged, 1 items without a majority" in said
    assert f"fit --config reward_model.yaml --data.path {out}" in said
    records = load_records(str(out))
    assert [record.pairs for record in records.rows] == [((0, 1),)] * 3
    assert records.rows[0].responses == ("i0 0", "i0 1")
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["trl", "hh"])
def test_other_forms_and_back(tmp_path: Path, form: str) -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "q"},
    ]
    items = [
        ("real", Item("c", "c", chat, ("x", "y"), (0, 1), {})),
        ("real", Item("t", "t", "q", ("v", "w"), (0, 1), {})),
    ]
    Store.create(tmp_path / "s.sqlite", {"task": "pairs", "criteria": []}, items)
    with Store(tmp_path / "s.sqlite", writing=True) as opened:
        opened.add([judged("1", "c", "second"), judged("2", "t", "first")])
    there, back = tmp_path / "there.jsonl", tmp_path / "back.jsonl"
    command = ["preferences", "export", str(tmp_path / "s.sqlite"), "--votes", "soft", "--form", form]
    assert main([*command, "--out", str(there)]) == 0
    rows = [json.loads(line) for line in there.read_text().splitlines()]
    if form == "trl":
        assert rows[0] == {
            "prompt": chat,
            "chosen": [{"role": "assistant", "content": "y"}],
            "rejected": [{"role": "assistant", "content": "x"}],
        }
        assert rows[1] == {"prompt": "q", "chosen": "v", "rejected": "w"}
    else:
        assert rows[0]["chosen"] == "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: q\n\nAssistant: y"
        assert set(rows[1]) == {"chosen", "rejected"}
    assert main(["preferences", "import", str(there), "--out", str(back)]) == 0
    again = [json.loads(line) for line in back.read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in again] == [("y", "x"), ("v", "w")]
    assert again[0]["prompt"] == chat


def test_a_form_without_probabilities_holds_no_even_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path / "s.sqlite").close()
    command = ["preferences", "export", str(tmp_path / "s.sqlite"), "--votes", "soft", "--out"]
    for form, count in (("ours", 4), ("trl", 3), ("hh", 3)):
        assert main([*command, str(tmp_path / form), "--form", form]) == 0
        assert len((tmp_path / form).read_text().splitlines()) == count
        assert (f"1 even rows, which {form} cannot hold" in capsys.readouterr().out) == (form != "ours")


def test_import_keeps_columns_and_numbers(tmp_path: Path) -> None:
    rows = [{"id": "k", "prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2, 3], "margin": 2, "topic": "t"}]
    out = tmp_path / "out.jsonl"
    assert main(["preferences", "import", str(write(tmp_path / "r.jsonl", rows)), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["chosen"], row["rejected"]) for row in found] == [
        ("k:0", "a", "b"),
        ("k:1", "a", "c"),
        ("k:2", "b", "c"),
    ]
    assert all((row["margin"], row["topic"]) == (2, "t") for row in found)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "STORE", "--out", "x.jsonl", "--votes", "soft"], "has no judgements yet; annotate first"),
        (["export", "STORE", "--out", "STORE", "--votes", "soft"], "this command reads it"),
        (["export", "STORE", "--out", "x.jsonl", "--votes", "soft", "--min_votes", "0"], "must be 1 or more"),
        (["export", "none", "--out", "x.jsonl", "--votes", "soft"], "none: no such store"),
        (["import", "rows.jsonl", "--out", "x.jsonl"], "holds no pair"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "STORE", ["i"])
    write(tmp_path / "rows.jsonl", [{"prompt": "q"}])
    assert main(["preferences", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()
