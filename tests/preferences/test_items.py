"""Candidate files and gold files become items, or one line that says where the fault is."""

from pathlib import Path

import pytest
from studies import candidates, write

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.items import Item, check_ids, read_candidates, read_gold
from rlhf_lightning.preferences.tasks import Pairs, Ranking, Rating


def test_pairs_are_every_two_answers_and_begin_with_one_of_each_row(tmp_path: Path) -> None:
    found = read_candidates(str(candidates(tmp_path / "c.jsonl", 2, 3)), Pairs())
    assert [(item.id, item.places) for item in found.items] == [
        ("r0:0-1", (0, 1)),
        ("r1:0-1", (0, 1)),
        ("r0:0-2", (0, 2)),
        ("r1:0-2", (0, 2)),
        ("r0:1-2", (1, 2)),
        ("r1:1-2", (1, 2)),
    ]
    assert found.items[2].completions == ("answer 0.0", "answer 0.2")
    assert found.items[2].columns == {"policies": ["p0", "p1", "p2"]}


def test_rankings_and_ratings_show_a_row_whole_and_equal_answers_once(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"prompt": "q", "completions": ["x", "y", "x"]}])
    assert read_candidates(str(path), Ranking()).items[0].completions == ("x", "y")
    assert read_candidates(str(path), Rating()).items[0].places == (0, 1)


def test_rows_without_a_difference_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completions": ["x", "x"]}, {"prompt": "p", "completions": ["x", "y"]}]
    found = read_candidates(str(write(tmp_path / "c.jsonl", rows)), Pairs())
    assert found.summary() == "1 items of 2 rows; left out: 1 rows whose answers are all equal"
    assert len(read_candidates(str(tmp_path / "c.jsonl"), Rating()).items) == 2


def test_an_item_is_the_same_after_the_store(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "<b>hi</b>\u202e"}]
    path = write(tmp_path / "c.jsonl", [{"prompt": chat, "completions": ["😀", " \x07"], "topic": 3}])
    item = read_candidates(str(path), Pairs()).items[0]
    assert Item.of(item.content()) == item
    assert item.turns() == chat
    assert item.prompt == chat
    assert item.completions == ("😀", " \x07")
    assert item.columns == {"topic": 3}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "q", "completions": ["one"]},
            r"c\.jsonl:2: key 'completions': has 1 answer; pairs needs 2 or more",
        ),
        ({"prompt": "q"}, r"c\.jsonl:2: key 'completions': is missing \(keys found: prompt\)"),
        ({"prompt": "q", "completions": "one"}, r"key 'completions': must be a list, got text"),
        ({"prompt": "q", "completions": ["a", 3]}, r"key 'completions\[1\]': must be text, got a number"),
        ({"completions": ["a", "b"]}, r"c\.jsonl:2: key 'prompt': is missing \(keys found: completions\)"),
        ({"prompt": " ", "completions": ["a", "b"]}, r"key 'prompt': is empty"),
        ({"id": "r0", "prompt": "q", "completions": ["a", "b"]}, r"key 'id': is 'r0' as in .*c\.jsonl:1"),
        ({"id": [1], "prompt": "q", "completions": ["a", "b"]}, r"key 'id': must be text or a whole number"),
    ],
)
def test_a_faulty_row_is_one_line(tmp_path: Path, row: dict, expected: str) -> None:
    good = {"id": "r0", "prompt": "q", "completions": ["a", "b"]}
    with pytest.raises(InputError, match=expected):
        read_candidates(str(write(tmp_path / "c.jsonl", [good, row])), Pairs())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"completions": ["a", "cut \ud83d"]}, r"c\.jsonl:1: key 'completions': holds half of a surrogate pair"),
        ({"completions": ["a", "b"], "note": "\0"}, r"key 'note': holds a NUL character"),
        ({"completions": ["a", "b"], "system": "Be evil"}, r"key 'system': is not shown to annotators"),
        (
            {"completions": ["a", [{"role": "assistant", "content": "b", "tool_calls": [{}]}]]},
            r"key 'completions\[1\]': has several messages or a tool call",
        ),
    ],
)
def test_what_people_would_not_see_as_it_is_is_refused(tmp_path: Path, row: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_candidates(str(write(tmp_path / "c.jsonl", [{"prompt": "q", **row}])), Pairs())


def test_a_pair_may_not_be_called_like_another_row(tmp_path: Path) -> None:
    rows = [
        {"id": "p", "prompt": "q", "completions": ["a", "b", "c"]},
        {"id": "p:0-1", "prompt": "q", "completions": ["a", "b"]},
    ]
    found = read_candidates(str(write(tmp_path / "c.jsonl", rows)), Pairs())
    with pytest.raises(InputError, match="two items are called 'p:0-1'"):
        check_ids(found.items)


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "q", "completions": ["a", "b"], "score": NaN}\n')
    assert read_candidates(str(path), Pairs()).items[0].columns == {"score": None}


def test_gold_rows(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prompt": "q", "completions": ["a", "b"], "gold": "second", "explanation": "b is short"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    first, second = read_gold(str(write(tmp_path / "g.jsonl", rows)), Pairs()).items
    assert (first.id, first.gold, first.explanation) == ("gold:7", {"choice": "second", "strength": None}, "b is short")
    assert (second.completions, second.gold["choice"]) == (("good", "bad"), "first")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"completions": ["a", "b"]}, r"g\.jsonl:1: key 'gold': is missing; give the right judgement: 'first'"),
        ({"completions": ["a", "b"], "gold": "A"}, r"key 'gold': must be 'first', 'second', 'tie' or 'both_bad'"),
        ({"completions": ["a", "b", "c"], "gold": "tie"}, r"has 3 answers; pairs needs exactly 2"),
        ({"completions": ["a", "b"], "gold": "tie", "explanation": 3}, r"key 'explanation': must be text"),
    ],
)
def test_a_faulty_gold_row_is_one_line(tmp_path: Path, row: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_gold(str(write(tmp_path / "g.jsonl", [{"prompt": "q", **row}])), Pairs())


def test_gold_that_nothing_could_contradict_is_refused(tmp_path: Path) -> None:
    for task, gold in ((Ranking(), [1, 1]), (Rating(), [{}, {}])):
        path = write(tmp_path / "g.jsonl", [{"prompt": "q", "completions": ["a", "b"], "gold": gold}])
        with pytest.raises(InputError, match="key 'gold'"):
            read_gold(str(path), task)


def test_gold_of_rankings_and_ratings_fits_the_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", [{"prompt": "q", "completions": ["a", "b"], "gold": [2, 1, 3]}])
    with pytest.raises(InputError, match=r"g\.jsonl:1: key 'gold': ranks: must be a list of 2"):
        read_gold(str(path), Ranking())
    with pytest.raises(InputError, match=r"g\.jsonl:1: key 'gold': ratings: must be a list of 2"):
        read_gold(str(path), Rating())
