"""Decides what each annotator judges next: calibration first, then real items, with gold and repeats hidden among them.

All draws follow from the store's secret key, the annotator and the item. So a server that is started again asks the
same, in the same order on the screen, and nobody can tell a hidden gold item or a repeat by its id.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.store import Judgement, Part

APART = 5  # judgements between an item and its repeat, so that nobody remembers the first answer
_STEP = 5  # see `Plan.progress`
IDLE = 600.0  # seconds after which an item that was shown may be shown to somebody else


@dataclass(frozen=True)
class Rules:
    """How a study asks.

    Args:
        overlap: annotators for each real item.
        quota: judgements that each annotator gives after calibration; None for as many as there are.
        gold_share: share of hidden gold items among what is asked.
        repeat_share: share of repeats among what is asked.
    """

    overlap: int = 1
    quota: int | None = None
    gold_share: float = 0.0
    repeat_share: float = 0.0


@dataclass(frozen=True)
class Ask:
    """An item that is put to an annotator."""

    id: str
    item: Item
    part: Part
    order: tuple[int, ...]  # order[p] is the answer at place p of the screen


@dataclass(frozen=True)
class Progress:
    """How far an annotator is, in the phase at hand."""

    phase: str  # calibration, judging, waiting (the last items are on others' screens) or done
    done: int
    quota: int | None
    left: int


class Conflict(InputError):
    """A judgement that does not count: its item is judged already."""


class Plan:
    """What is judged, and what is asked next.

    Args:
        items: the study's items with their parts, in its order.
        rows: all rows of the store.
        rules: how the study asks.
        key: the store's secret.
        clock: seconds, for items that are held for an annotator.
    """

    def __init__(
        self,
        items: Iterable[tuple[Part, Item]],
        rows: Iterable[Judgement],
        rules: Rules,
        key: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules = rules
        self._key, self._clock = key, clock
        self._items: dict[Part, dict[str, Item]] = {"calibration": {}, "gold": {}, "real": {}, "repeat": {}}
        for part, item in items:
            self._items[part][item.id] = item
        self._standing: dict[str, dict[tuple[str, Part], Judgement]] = {}  # by annotator, in the order of arrival
        self._undone: dict[str, dict[tuple[str, Part], int]] = {}  # by annotator: what to ask again, by undo
        self._judged: dict[str, set[str]] = {name: set() for name in self._items["real"]}  # who judged an item
        self._open = dict.fromkeys(self._items["real"])  # real items that lack judgements, in order
        self._held: dict[str, dict[str, float]] = {}  # by item: for whom, since when
        self._asked: dict[str, Ask] = {}  # by annotator: what is on the screen
        by_number: dict[int, Judgement] = {}
        for row in rows:
            by_number[row.number] = row
            self.note(row, by_number.get(row.undoes or 0))

    def next(self, annotator: str) -> Ask | None:
        """What the annotator judges next; None if there is nothing."""
        chosen = self._choose(annotator)
        if chosen is None:
            self._asked.pop(annotator, None)
            return None
        ask = self._ask(annotator, *chosen)
        self._asked[annotator] = ask
        if ask.part == "real":
            self._hold(annotator, ask.item.id)
        return ask

    def find(self, annotator: str, ask_id: str) -> Ask:
        """The ask of this id, also one of an earlier run of the server. InputError if there never was one."""
        asked = self._asked.get(annotator)
        if asked is not None and asked.id == ask_id:
            return asked
        for part, items in self._items.items():
            standing = self._standing.get(annotator, {})
            for name in items if part != "repeat" else [name for name, of in standing if of == "real"]:
                if self.ask_id(annotator, name, part) == ask_id:
                    return self._ask(annotator, name, part)
        raise InputError("ask: no item has this id; load the page again")

    def check(self, annotator: str, ask: Ask, counts: bool = True) -> None:
        """Holds the item until the judgement is noted. Raises Conflict if the judgement does not count.

        Args:
            annotator: who judged.
            ask: what.
            counts: whether it counts towards the overlap; a skip does not.
        """
        if (ask.item.id, ask.part) in self._standing.get(annotator, {}):
            raise Conflict("this item is judged already; load the page again, or undo the judgement first")
        if ask.part == "real" and counts:
            name = ask.item.id
            if len(self._judged[name]) + len(self._others(annotator, name, fresh=True)) >= self.rules.overlap:
                raise Conflict("others have judged this item in the meantime; the next one follows")
            self._hold(annotator, name)

    def note(self, row: Judgement, undone: Judgement | None = None) -> None:
        """Counts a row of the store.

        Args:
            row: the row.
            undone: the row that it takes back, if it is an undo.
        """
        standing = self._standing.setdefault(row.annotator, {})
        again = self._undone.setdefault(row.annotator, {})
        place = (row.item, row.part)
        if undone is not None:
            standing.pop(place)
            again[place] = row.number
            if row.part == "real":
                self._judged[row.item].discard(row.annotator)
                self._open = {name: None for name in self._judged if not self._complete(name)}
                self._hold(row.annotator, row.item)
            return
        standing[place] = row
        again.pop(place, None)
        self._held.get(row.item, {}).pop(row.annotator, None)
        if row.part == "real" and row.value is not None:
            self._judged[row.item].add(row.annotator)
            if self._complete(row.item):
                self._open.pop(row.item, None)
                for undone_ones in self._undone.values():  # others have judged it since
                    if undone_ones.pop((row.item, "real"), None) is not None:
                        undone_ones.pop((row.item, "repeat"), None)

    def last(self, annotator: str) -> Judgement | None:
        """The annotator's last row that stands, which an undo takes back."""
        return next(reversed(self._standing.get(annotator, {}).values()), None)

    def progress(self, annotator: str) -> Progress:
        """How far the annotator is."""
        standing = self._standing.get(annotator, {})
        calibration = self._items["calibration"]
        calibrated = sum((name, "calibration") in standing for name in calibration)
        if calibrated < len(calibration):
            return Progress("calibration", calibrated, len(calibration), len(calibration) - calibrated)
        # Hidden items count as all others, and what is left is told in steps of `_STEP`: else a counter that stands
        # still would tell which item was hidden.
        done = sum(row.value is not None for row in standing.values() if row.part != "calibration")
        open_ones = sum((name, "real") not in standing for name in self._open)
        left = -(-open_ones // _STEP) * _STEP
        if self.rules.quota is not None:
            left = max(0, min(left, self.rules.quota - done))
        if self._choose(annotator) is not None:
            return Progress("judging", done, self.rules.quota, left)
        return Progress("waiting" if left else "done", done, self.rules.quota, left)

    def counts(self) -> tuple[int, int]:
        """The number of real items, and of those with all their judgements."""
        return len(self._judged), len(self._judged) - len(self._open)

    def _choose(self, annotator: str) -> tuple[str, Part] | None:
        standing = self._standing.get(annotator, {})
        asked = self._asked.get(annotator)
        if again := self._undone.get(annotator):
            return max(again, key=again.__getitem__)  # what was undone last, so that they come in their old order
        if asked is not None and self._still(annotator, asked):
            return asked.item.id, asked.part
        for name in self._items["calibration"]:
            if (name, "calibration") not in standing:
                return name, "calibration"
        rows = [row for row in standing.values() if row.part != "calibration"]
        if self.rules.quota is not None and sum(row.value is not None for row in rows) >= self.rules.quota:
            return None
        real = self._next_real(annotator)
        if real is None:
            return None
        draw = self._number("draw", annotator, str(len(rows))) / 2**64
        if draw < self.rules.gold_share:
            unseen = [name for name in self._items["gold"] if (name, "gold") not in standing]
            if unseen:
                return min(unseen, key=lambda name: self._number("gold", annotator, name)), "gold"
        elif draw < self.rules.gold_share + self.rules.repeat_share:
            for row in rows[: -APART or None]:
                if row.part == "real" and row.value is not None and (row.item, "repeat") not in standing:
                    return row.item, "repeat"
        return real, "real"

    def _next_real(self, annotator: str) -> str | None:
        standing = self._standing.get(annotator, {})
        idle = None  # held for somebody who may have left
        for name in self._open:
            if (name, "real") in standing:
                continue
            room = self.rules.overlap - len(self._judged[name])
            if len(self._others(annotator, name, fresh=False)) < room:
                return name
            if idle is None and len(self._others(annotator, name, fresh=True)) < room:
                idle = name
        return idle

    def _still(self, annotator: str, asked: Ask) -> bool:
        """Whether what is on the annotator's screen is still to be judged."""
        standing, name = self._standing.get(annotator, {}), asked.item.id
        if (name, asked.part) in standing:
            return False
        if asked.part == "repeat":
            return (name, "real") in standing
        return asked.part != "real" or (name in self._open and annotator in self._held.get(name, {}))

    def _others(self, annotator: str, name: str, fresh: bool) -> list[str]:
        """For whom else an item is held: all, or only those who were shown it of late."""
        now = self._clock()
        held = self._held.get(name, {})
        return [other for other, since in held.items() if other != annotator and not (fresh and now - since > IDLE)]

    def _hold(self, annotator: str, name: str) -> None:
        self._held.setdefault(name, {})[annotator] = self._clock()

    def _complete(self, name: str) -> bool:
        return len(self._judged[name]) >= self.rules.overlap

    def _ask(self, annotator: str, name: str, part: Part) -> Ask:
        item = self._items["real" if part == "repeat" else part][name]
        if part == "repeat":
            order = self._standing[annotator][name, "real"].shown[::-1]
        else:
            places = range(len(item.completions))
            order = tuple(sorted(places, key=lambda place: self._number("order", annotator, name, str(place))))
        return Ask(self.ask_id(annotator, name, part), item, part, order)

    def ask_id(self, annotator: str, name: str, part: Part) -> str:
        """The id under which an item is put to an annotator; it tells nobody which part it is of."""
        return f"{self._number('ask', annotator, name, part):016x}"

    def _number(self, *words: str) -> int:
        """64 bits that follow from the key and the words."""
        digest = hmac.digest(self._key, "\0".join(words).encode(errors="replace"), hashlib.sha256)
        return int.from_bytes(digest[:8], "big")
