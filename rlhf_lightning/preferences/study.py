"""A study at work: what the server's requests do to the plan and the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlhf_lightning.data.files import faulty_text
from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.agreement import live
from rlhf_lightning.preferences.assignment import Ask, Conflict, Plan, Rules
from rlhf_lightning.preferences.store import Judgement, Store

_COMMENT = 10_000  # letters of a comment or of a flag's reason
_LONGEST = 10_000_000  # seconds
_NAME = 64  # letters of an annotator's name and of a client's id
_KEYS = ("client_id", "annotator", "ask", "value", "skip", "flag", "comment", "seconds")
Answer = dict[str, Any]  # what is sent as JSON


class Study:
    """Answers the requests of annotators and of the lead.

    Rows that arrive while others are written go to the disk together, in one commit. So many annotators at once do not
    wait for one commit each.

    Args:
        store: the store, open for writing.
        rules: how items are asked.
        annotators: the only names that may judge; None for any.
        guidelines: HTML, or None.
    """

    def __init__(self, store: Store, rules: Rules, annotators: Sequence[str] | None, guidelines: str | None) -> None:
        self.store, self.annotators, self.guidelines = store, annotators, guidelines
        self.task = store.task
        self.key = bytes.fromhex(store.study["key"])
        self._items = list(store.items())
        self._gold = {item.id: item for part, item in self._items if part == "calibration"}
        self._rows = store.rows()
        self.plan = Plan(self._items, self._rows, rules, self.key)
        self._by_client = {row.client_id: row for row in self._rows}
        self._by_number = {row.number: row for row in self._rows}
        self._waiting: list[Judgement] = []
        self._arrivals: dict[str, asyncio.Future[Judgement]] = {}  # by client id, until the row is on the disk
        self._writer: asyncio.Task[None] | None = None

    def next(self, annotator: str) -> Answer:
        """What the annotator judges next, and how far they are."""
        ask = self.plan.next(self.named(annotator))
        return {"item": None if ask is None else self._shown(ask), **self._progress(annotator)}

    async def judge(self, sent: Any) -> Answer:
        """Keeps a judgement, a skip or a flag. Returns when it is on the disk.

        Raises: InputError for what is no judgement, Conflict for one that does not count, OSError if it is not saved.
        """
        if not isinstance(sent, dict) or not set(sent) <= set(_KEYS):
            raise InputError(f"expected an object with {', '.join(_KEYS)}")
        annotator, client = self.named(sent.get("annotator")), _client(sent)
        row = await self._once(client, annotator)
        if row is None:
            ask = self.plan.find(annotator, _text(sent, "ask", _NAME) or "")
            row = await self._keep(self._judgement(sent, ask, client, annotator), ask)
        elif row.undoes is not None or self.plan.ask_id(annotator, row.item, row.part) != sent.get("ask"):
            raise Conflict("client_id: is that of another judgement; give each one an id of its own")
        return {"number": row.number, "feedback": self._feedback(row), "next": self.next(annotator)}

    async def undo(self, sent: Any) -> Answer:
        """Takes the annotator's last judgement back, and shows its item again.

        Raises: InputError if there is none, OSError if that could not be saved.
        """
        if not isinstance(sent, dict):
            raise InputError("expected an object with client_id and annotator")
        annotator, client = self.named(sent.get("annotator")), _client(sent)
        row = await self._once(client, annotator)
        if row is None:
            last = self.plan.last(annotator)
            if last is None:
                raise InputError("there is no judgement to undo")
            row = await self._keep(Judgement(client, annotator, last.item, last.part, (), undoes=last.number))
        if row.undoes is None:
            raise InputError("client_id: is that of a judgement; give the undo an id of its own")
        last = self._by_number[row.undoes]
        found = self.next(annotator)
        shown = found["item"] is not None and found["item"]["ask"] == self.plan.ask_id(annotator, last.item, last.part)
        if not shown:  # the undo was sent again, after more had happened
            return {**found, "value": None, "comment": None}
        value = None if last.value is None else self.task.shown(last.value, last.shown)
        return {**found, "value": value, "comment": last.comment}

    def lead(self) -> Answer:
        """How the study goes: agreement, annotators, flags. Only the lead sees it."""
        undone = {row.undoes for row in self._rows}
        standing = [row for row in self._rows if row.undoes is None and row.number not in undone]
        found = live(self._items, standing, self.task)
        names = dict.fromkeys([*(self.annotators or ()), *(row.annotator for row in standing)])
        everyone = {}
        for name in names:
            rows = [row for row in standing if row.annotator == name]
            everyone[name] = {
                "done": sum(row.part == "real" and row.value is not None for row in rows),
                "calibrated": self.plan.progress(name).phase != "calibration",
                "skipped": sum(row.value is None for row in rows),
                "flagged": sum(row.flag is not None for row in rows),
                **found["annotators"].get(name, {}),
            }
        total, complete = self.plan.counts()
        flags = [{"annotator": r.annotator, "item": r.item, "reason": r.flag} for r in standing if r.flag is not None]
        return {
            "task": self.task.name,
            "items": {"all": total, "complete": complete},
            "judgements": sum(row.value is not None for row in standing),
            "alpha": found["alpha"],
            "annotators": everyone,
            "flags": flags,
        }

    def judgements(self) -> tuple[int, int]:
        """The number of judgements that stand, and of annotators who gave them."""
        undone = {row.undoes for row in self._rows}
        standing = [row for row in self._rows if row.value is not None and row.number not in undone]
        return len(standing), len({row.annotator for row in standing})

    def named(self, given: Any) -> str:
        """An annotator's name, checked."""
        if not isinstance(given, str) or not given.strip() or len(given) > _NAME or not given.isprintable():
            raise InputError(f"annotator: give a name of 1 to {_NAME} letters")
        if self.annotators is not None and given not in self.annotators:
            raise InputError(f"annotator: {given!r} is none of the names of this study")
        return given

    def _judgement(self, sent: Answer, ask: Ask, client: str, annotator: str) -> Judgement:
        flag, comment = _text(sent, "flag", _COMMENT), _text(sent, "comment", _COMMENT)
        value, skip = sent.get("value"), sent.get("skip", False)
        if not isinstance(skip, bool) or (skip and value is not None):
            raise InputError("skip: must be true or false, and true only where value is null")
        if value is None and not skip and flag is None:
            raise InputError("value: give a judgement, or null with skip true or with a flag's reason")
        kept = None if value is None else self.task.answer(value, ask.order)
        seconds = sent.get("seconds")
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
            raise InputError("seconds: must be a number or null")
        if seconds is not None and not 0 <= seconds <= _LONGEST:
            raise InputError(f"seconds: must be from 0 to {_LONGEST:,}")
        return Judgement(client, annotator, ask.item.id, ask.part, ask.order, kept, flag, comment, seconds)

    async def _once(self, client: str, annotator: str) -> Judgement | None:
        """The row of this client id, if it has come before; waits until it is on the disk."""
        row = await asyncio.shield(self._arrivals[client]) if client in self._arrivals else self._by_client.get(client)
        if row is not None and row.annotator != annotator:
            raise InputError("client_id: another annotator used it; make a new one for each judgement")
        return row

    async def _keep(self, row: Judgement, ask: Ask | None = None) -> Judgement:
        if any(
            (other.annotator, other.item, other.part) == (row.annotator, row.item, row.part) for other in self._new()
        ):
            raise InputError("this item is being saved; wait a moment")
        if ask is not None:
            self.plan.check(row.annotator, ask, counts=row.value is not None)
        future = self._arrivals[row.client_id] = asyncio.get_running_loop().create_future()
        self._waiting.append(row)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        return await asyncio.shield(future)

    def _new(self) -> list[Judgement]:
        return [*self._waiting, *self._writing]

    _writing: Sequence[Judgement] = ()  # the rows of the commit at hand

    async def _write(self) -> None:
        while self._waiting:
            self._writing, self._waiting = self._waiting, []
            found: Sequence[Judgement | Exception]
            try:
                found = await asyncio.to_thread(self.store.add, self._writing)
            except InputError as error:  # the disk is full, or the like: it is so for all
                found = [error] * len(self._writing)
            except Exception:  # one row is at fault, and the others are not to suffer for it
                found = [await asyncio.to_thread(self._alone, row) for row in self._writing]
            for row, kept in zip(self._writing, found, strict=True):
                future = self._arrivals.pop(row.client_id)
                if isinstance(kept, Exception):
                    future.set_exception(OSError(str(kept)))
                    future.exception()  # it is handled, even if the client has gone
                    continue
                self._rows.append(kept)
                self._by_client[kept.client_id] = self._by_number[kept.number] = kept
                self.plan.note(kept, self._by_number.get(kept.undoes or 0))
                future.set_result(kept)
            self._writing = ()

    def _alone(self, row: Judgement) -> Judgement | Exception:
        try:
            return self.store.add([row])[0]
        except Exception as error:
            return error

    def _shown(self, ask: Ask) -> Answer:
        return {
            "ask": ask.id,
            "prompt": ask.item.turns(),
            "answers": [ask.item.completions[place] for place in ask.order],
        }

    def _feedback(self, row: Judgement) -> Answer | None:
        if row.part != "calibration" or row.value is None:
            return None
        item = self._gold[row.item]
        right = self.task.agrees(row.value, item.gold)
        return {"right": right, "gold": self.task.shown(item.gold, row.shown), "explanation": item.explanation or None}

    def _progress(self, annotator: str) -> Answer:
        progress = asdict(self.plan.progress(annotator))
        phase = progress.pop("phase")
        return {"phase": phase, "progress": progress, "undoable": self.plan.last(annotator) is not None}


def _client(sent: Answer) -> str:
    given = _text(sent, "client_id", _NAME)
    if not given:
        raise InputError(f"client_id: give each judgement an id of its own, a text of at most {_NAME} letters")
    return given


def _text(sent: Answer, key: str, most: int) -> str | None:
    given = sent.get(key)
    if given is not None and not isinstance(given, str):
        raise InputError(f"{key}: must be text or null")
    if given is not None and len(given) > most:
        raise InputError(f"{key}: must have at most {most:,} letters")
    if fault := faulty_text(given):
        raise InputError(f"{key}: {fault}")
    return (given or None) if given is None or given.strip() else None
