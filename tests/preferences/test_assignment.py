"""Who judges what: nobody twice, no item over its overlap, gold and repeats hidden, undo in the order of arrival."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from studies import item, judged

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.assignment import APART, IDLE, Ask, Conflict, Plan, Rules
from rlhf_lightning.preferences.store import Judgement

GOLD = {"choice": "first", "strength": None}


class Desk:
    """A plan with a store in memory.

    Args:
        real, gold, calibration: numbers of items.
        rules: as in `Rules`.
    """

    def __init__(self, real: int, gold: int = 0, calibration: int = 0, **rules: float) -> None:
        self.items = [("real", item(f"r{n}")) for n in range(real)]
        self.items += [("gold", item(f"g{n}", gold=GOLD)) for n in range(gold)]
        self.items += [("calibration", item(f"c{n}", gold=GOLD)) for n in range(calibration)]
        self.rules = Rules(**rules)  # type: ignore[arg-type]
        self.now = 0.0
        self.rows: list[Judgement] = []
        self.plan = self.started()

    def started(self) -> Plan:
        return Plan(self.items, self.rows, self.rules, b"key", lambda: self.now)

    def judge(self, annotator: str, ask: Ask | None = None, skip: bool = False) -> Ask | None:
        """Judges what is asked, or this ask."""
        ask = ask or self.plan.next(annotator)
        if ask is not None:
            self.plan.check(annotator, ask, counts=not skip)
            row = judged(f"k{len(self.rows)}", ask.item.id, annotator=annotator, part=ask.part)
            self.add(replace(row, shown=ask.order, value=None if skip else row.value))
        return ask

    def undo(self, annotator: str) -> Judgement:
        last = self.plan.last(annotator)
        assert last is not None
        self.add(Judgement(f"k{len(self.rows)}", annotator, last.item, last.part, (), undoes=last.number), last)
        return last

    def add(self, row: Judgement, undone: Judgement | None = None) -> None:
        row = replace(row, number=len(self.rows) + 1)
        self.rows.append(row)
        self.plan.note(row, undone)


def test_each_item_goes_to_as_many_annotators_as_its_overlap_and_to_nobody_twice() -> None:
    desk, draw = Desk(40, overlap=3), random.Random(0)
    names = [f"a{n}" for n in range(7)]
    while any(desk.plan.next(name) is not None for name in names):
        name = draw.choice(names)
        if draw.random() < 0.3:  # look at an item now, judge it later
            desk.plan.next(name)
        else:
            desk.judge(name, skip=draw.random() < 0.05)
    given = Counter(row.item for row in desk.rows if row.value is not None)
    assert set(given.values()) == {3}
    assert len(given) == 40
    assert max(Counter((row.annotator, row.item) for row in desk.rows).values()) == 1


def test_a_looked_at_item_is_kept_for_its_annotator_until_they_are_idle() -> None:
    desk = Desk(1)
    ask = desk.plan.next("a")
    assert ask is not None
    assert desk.plan.next("b") is None
    desk.now = IDLE + 1
    assert desk.judge("b") is not None
    with pytest.raises(Conflict, match="others have judged this item"):
        desk.judge("a", ask)
    assert desk.plan.next("a") is None


def test_the_same_item_is_shown_until_it_is_judged_and_after_a_new_start() -> None:
    desk = Desk(10, gold=3, gold_share=0.3)
    for _ in range(4):
        desk.judge("a")
    ask = desk.plan.next("a")
    assert ask is not None
    assert desk.plan.next("a") == ask
    again = desk.started()
    assert again.find("a", ask.id) == ask
    assert again.next("a") == ask
    with pytest.raises(InputError, match="no item has this id"):
        again.find("b", ask.id)  # ids belong to one annotator


def test_calibration_comes_first_for_everybody() -> None:
    desk = Desk(5, calibration=2, overlap=2)
    for name in ("a", "b"):
        assert [desk.judge(name).item.id for _ in range(3)][:2] == ["c0", "c1"]  # type: ignore[union-attr]
        assert desk.plan.progress(name).phase == "judging"


def test_gold_and_repeats_come_at_their_shares_and_repeats_are_swapped() -> None:
    desk = Desk(400, gold=40, gold_share=0.1, repeat_share=0.1)
    while desk.judge("a"):
        pass
    parts = Counter(row.part for row in desk.rows)
    assert parts["real"] == 400
    assert 25 <= parts["gold"] <= 40
    assert 25 <= parts["repeat"] <= 75  # 49 are expected
    place = {(row.item, row.part): number for number, row in enumerate(desk.rows)}
    for row in desk.rows:
        if row.part == "repeat":
            first = desk.rows[place[row.item, "real"]]
            assert row.shown == first.shown[::-1]
            assert place[row.item, "repeat"] - place[row.item, "real"] >= APART
    sides = Counter(row.shown for row in desk.rows if row.part == "real")
    assert 160 <= sides[0, 1] <= 240


def test_ids_and_orders_tell_nothing_about_the_part() -> None:
    desk = Desk(30, gold=10, gold_share=0.3, repeat_share=0.2)
    asks = []
    while ask := desk.judge("a"):
        asks.append(ask)
    assert {len(ask.id) for ask in asks} == {16}
    assert len({ask.id for ask in asks}) == len(asks)


def test_undo_goes_back_as_far_as_one_likes_and_asks_again_in_the_same_order() -> None:
    desk = Desk(6)
    judged_before = [desk.judge("a").item.id for _ in range(4)]  # type: ignore[union-attr]
    assert [desk.undo("a").item for _ in range(4)] == judged_before[::-1]
    assert desk.plan.last("a") is None
    assert [desk.judge("a").item.id for _ in range(4)] == judged_before  # type: ignore[union-attr]
    assert desk.plan.progress("a").done == 4


def test_an_undone_item_stays_with_its_annotator() -> None:
    desk = Desk(1)
    desk.judge("a")
    desk.undo("a")
    assert desk.plan.next("b") is None
    assert desk.judge("a") is not None
    assert desk.plan.counts() == (1, 1)


def test_nobody_is_stuck_with_an_undone_item_that_others_have_judged_since() -> None:
    desk = Desk(3)
    first = desk.judge("a")
    desk.undo("a")
    desk.now = IDLE + 1
    while desk.judge("b"):
        pass
    assert first is not None
    assert desk.plan.next("a") is None
    assert desk.started().next("a") is None
    desk.judge("a", first, skip=True)  # a skip never counts towards the overlap


def test_a_counter_does_not_tell_hidden_items() -> None:
    desk = Desk(60, gold=20, gold_share=0.3, repeat_share=0.2)
    before = desk.plan.progress("a")
    parts = set()
    while ask := desk.judge("a"):
        after = desk.plan.progress("a")
        parts.add(ask.part)
        assert after.done == before.done + 1  # for a real, a gold, and a repeated item alike
        assert after.left % 5 == 0
        before = after
    assert parts == {"real", "gold", "repeat"}


def test_the_last_items_on_other_screens_are_waited_for() -> None:
    desk = Desk(1)
    desk.plan.next("a")
    assert desk.plan.next("b") is None
    assert desk.plan.progress("b").phase == "waiting"
    desk.judge("a")
    assert desk.plan.progress("b").phase == "done"


def test_what_was_undone_last_comes_first() -> None:
    """In two windows: an item undone in one, another judged and undone in the other."""
    desk = Desk(4)
    first = desk.judge("a")
    desk.undo("a")
    other = desk.plan._ask("a", "r3", "real")
    desk.judge("a", other)
    assert desk.undo("a").item == "r3"
    again = desk.plan.next("a")
    assert again is not None and again.item.id == "r3"
    desk.judge("a")
    assert desk.plan.next("a") == first


def test_a_judged_item_does_not_count_twice() -> None:
    desk = Desk(3)
    ask = desk.judge("a")
    with pytest.raises(Conflict, match="judged already"):
        desk.judge("a", ask)


def test_a_skipped_item_goes_to_others_and_never_back() -> None:
    desk = Desk(1)
    desk.judge("a", skip=True)
    assert desk.plan.next("a") is None
    assert desk.judge("b") is not None


def test_the_quota_ends_the_work() -> None:
    desk = Desk(10, calibration=1, quota=3)
    done = []
    while desk.judge("a"):
        done.append(desk.plan.progress("a"))
    assert len(done) == 4
    assert [(p.phase, p.done, p.left) for p in done[1:]] == [("judging", 1, 2), ("judging", 2, 1), ("done", 3, 0)]


def test_a_new_start_counts_what_the_old_one_did() -> None:
    desk = Desk(20, gold=5, calibration=2, overlap=2, gold_share=0.2, repeat_share=0.2)
    draw = random.Random(1)
    for _ in range(30):
        name = draw.choice("abc")
        if draw.random() < 0.2 and desk.plan.last(name):
            desk.undo(name)
        else:
            desk.judge(name)
    again = desk.started()
    for name in "abc":
        assert again.progress(name) == desk.plan.progress(name)
        assert again.last(name) == desk.plan.last(name)
    assert again.counts() == desk.plan.counts()
