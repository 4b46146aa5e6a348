"""What the page sends is read in the item's order, and what is no judgement is refused."""

from itertools import permutations

import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.tasks import Pairs, Ranking, Rating, Task, task_of


def test_a_pair_is_kept_in_the_items_order() -> None:
    task = Pairs(["honest"])
    sent = {"choice": "a", "strength": 2, "criteria": {"honest": "b"}}
    assert task.answer(sent, (0, 1)) == {"choice": "first", "strength": 2, "criteria": {"honest": "second"}}
    assert task.answer(sent, (1, 0)) == {"choice": "second", "strength": 2, "criteria": {"honest": "first"}}


def test_a_ranking_is_kept_in_the_items_order_without_gaps() -> None:
    # Shown: the item's answers 2, 0, 1. The annotator puts the first shown on top.
    assert Ranking().answer({"ranks": [1, 7, 4]}, (2, 0, 1)) == {"ranks": [3, 2, 1]}
    assert Ranking().answer({"ranks": [2, None, 2]}, (2, 0, 1)) == {"ranks": [None, 1, 1]}


def test_a_rating_is_kept_in_the_items_order() -> None:
    sent = {"ratings": [{"kind": 5, "true": 1}, {"kind": 2, "true": 3}]}
    kept = Rating(["kind", "true"]).answer(sent, (1, 0))
    assert kept == {"ratings": [{"kind": 2, "true": 3}, {"kind": 5, "true": 1}]}


@pytest.mark.parametrize(
    ("task", "sent"),
    [
        (Pairs(), {"choice": "b", "strength": None}),
        (Pairs(), {"choice": "both_bad", "strength": None}),
        (Pairs(["x"]), {"choice": "tie", "strength": None, "criteria": {"x": "a"}}),
        (Ranking(), {"ranks": [2, 1]}),
        (Rating(), {"ratings": [{"overall": 1}, {"overall": 4}]}),
    ],
)
def test_what_is_shown_again_is_what_was_sent(task: Task, sent: dict) -> None:
    for order in permutations(range(2)):
        assert task.shown(task.answer(sent, order), order) == sent


@pytest.mark.parametrize(
    ("task", "sent", "expected"),
    [
        (Pairs(), None, "value: must be an object"),
        (Pairs(), {"choice": "c"}, "choice: must be a, b, tie or both_bad, got 'c'"),
        (Pairs(), {"choice": "a", "strength": 4}, "strength: must be 1, 2, 3 or null, got 4"),
        (Pairs(), {"choice": "a", "strength": True}, "strength: must be"),
        (Pairs(), {"choice": "tie", "strength": 1}, "strength: says how much better"),
        (Pairs(), {"choice": "a", "criteria": {"x": "a"}}, "criteria: must be of"),
        (Pairs(["x"]), {"choice": "a", "criteria": {"x": "both_bad"}}, r"criteria\.x: must be a, b or tie"),
        (Pairs(), {"choice": "a", "extra": 1}, "unknown key 'extra'"),
        (Ranking(), {"ranks": [1]}, "ranks: must be a list of 2"),
        (Ranking(), {"ranks": [1, None]}, "at least two answers must be ranked"),
        (Ranking(), {"ranks": [0, 1]}, "whole numbers from 1"),
        (Ranking(), {"ranks": [1.0, 2]}, "whole numbers from 1"),
        (Rating(), {"ratings": [{"overall": 6}, {"overall": 1}]}, "whole number from 1 to 5, got 6"),
        (Rating(), {"ratings": [{"overall": 1}, {}]}, "every answer needs overall"),
        (Rating(["x"]), {"ratings": [{"y": 1}, {"x": 1}]}, "'y' is no criterion"),
    ],
)
def test_what_is_no_judgement_is_refused(task: Task, sent: object, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        task.answer(sent, (0, 1))


def test_agreement_with_gold() -> None:
    pairs = Pairs()
    choice = lambda word: {"choice": word, "strength": None}  # noqa: E731
    assert pairs.agrees(choice("first"), choice("first"))
    assert not pairs.agrees(choice("first"), choice("second"))
    assert not pairs.agrees(choice("first"), choice("tie"))
    assert pairs.agrees(choice("both_bad"), choice("tie"))
    ranking = Ranking()
    assert ranking.agrees({"ranks": [1, 2, 3]}, {"ranks": [1, 2, None]})
    assert ranking.agrees({"ranks": [1, 1, 2]}, {"ranks": [2, 1, 3]})  # a tie contradicts no order
    assert not ranking.agrees({"ranks": [1, 2, 3]}, {"ranks": [1, 3, 2]})
    assert not ranking.agrees({"ranks": [1, 2, None]}, {"ranks": [None, 1, 2]})  # nothing can be compared
    rating = Rating()
    assert rating.agrees({"ratings": [{"overall": 4}]}, {"ratings": [{"overall": 5}]})
    assert not rating.agrees({"ratings": [{"overall": 3}]}, {"ratings": [{"overall": 5}]})


def test_tasks_by_name() -> None:
    assert task_of("rating", ["x"]).criteria == ("x",)
    with pytest.raises(InputError, match="--task: expected pairs, ranking, rating, got 'pair'"):
        task_of("pair")
    with pytest.raises(InputError, match="--criteria: a ranking has none"):
        task_of("ranking", ["x"])
