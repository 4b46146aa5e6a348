"""The store of a study: one SQLite file that judgements are only ever added to.

Nothing in it is changed or deleted, and triggers refuse it: an undo is a row that names the row it takes back. A
judgement is on the disk when `Store.add` returns (write-ahead log, full synchronisation). So a process that is killed
at any moment loses none that it has acknowledged. A client's own id makes a judgement that is sent twice count once.

Tables: ``study`` (key, value as JSON), ``items`` (place, id, part, content as JSON), and ``judgements``:

| column | content |
|---|---|
| number | 1, 2, ... in the order of arrival |
| client_id | the id that the client gave it |
| annotator, item | who judged what |
| part | ``calibration``, ``gold`` (hidden), ``real`` or ``repeat`` |
| shown | the order of the answers on the screen, a JSON list |
| value | the judgement in the item's order as JSON; null for a skip, a flag without a judgement, and an undo |
| flag, comment | what the annotator wrote |
| seconds | how long the item was in view |
| undoes | the number of the row that this one takes back |
| at | when it arrived, UTC |
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.items import Item
from rlhf_lightning.preferences.tasks import Task, Value, task_of

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

Part = str  # one of PARTS
PARTS = ("calibration", "gold", "real", "repeat")
_APPLICATION = 0x524C4846  # "RLHF", which marks a file of this kind
_FORMAT = 1
_SCHEMA = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
  place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, part TEXT NOT NULL, content TEXT NOT NULL
);
CREATE TABLE judgements (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  client_id TEXT NOT NULL UNIQUE,
  annotator TEXT NOT NULL,
  item TEXT NOT NULL REFERENCES items (id),
  part TEXT NOT NULL,
  shown TEXT NOT NULL,
  value TEXT,
  flag TEXT,
  comment TEXT,
  seconds REAL,
  undoes INTEGER UNIQUE REFERENCES judgements (number),
  at TEXT NOT NULL
);
"""
_KEPT = "".join(
    f"CREATE TRIGGER {table}_{action} BEFORE {action} ON {table} "
    "BEGIN SELECT RAISE(ABORT, 'rows are only ever added'); END;\n"
    for table in ("study", "items", "judgements")
    for action in ("UPDATE", "DELETE")
)


@dataclass(frozen=True)
class Judgement:
    """A row of the store: a judgement, a skip (no value), or an undo (`undoes`)."""

    client_id: str
    annotator: str
    item: str
    part: Part
    shown: tuple[int, ...]
    value: Value | None = None
    flag: str | None = None
    comment: str | None = None
    seconds: float | None = None
    undoes: int | None = None
    number: int = 0  # given by the store
    at: str = ""  # given by the store

    @property
    def skipped(self) -> bool:
        """Whether the annotator gave no judgement."""
        return self.value is None and self.undoes is None


class Store:
    """An open store.

    Args:
        path: the file, which exists.
        writing: whether judgements will be added. One process at a time may do that.

    Raises: InputError if it is no store, is torn, of a later version, or another process writes to it.
    """

    def __init__(self, path: str | Path, writing: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such store; annotate makes one")
        self._lock = _locked(self.path) if writing else None
        try:
            with self._reading():
                self._base = _connected(self.path, writing)
                self._check()
                self.study = {key: json.loads(value) for key, value in self._base.execute("SELECT * FROM study")}
                bytes.fromhex(self.study.get("key", ""))
                self.task: Task = task_of(self.study["task"], self.study["criteria"])
        except InputError:
            self.close()
            raise

    @classmethod
    def create(cls, path: str | Path, study: dict[str, Any], items: Sequence[tuple[Part, Item]]) -> None:
        """Makes a store with these items. It appears under its name when it is complete.

        Args:
            path: the file, which must not exist.
            study: what the study is, as JSON values; ``task`` and ``criteria`` among them.
            items: the items with their parts, in the order of the study.

        Raises: InputError if the file cannot be written.
        """
        path = Path(path)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.touch(mode=0o600)  # the key in it opens the server
            base = sqlite3.connect(staged)
            with base:
                base.executescript(_SCHEMA + _KEPT)
                base.execute(f"PRAGMA application_id = {_APPLICATION}")
                base.execute(f"PRAGMA user_version = {_FORMAT}")
                rows = [(key, json.dumps(value)) for key, value in study.items()]
                base.executemany("INSERT INTO study VALUES (?, ?)", rows)
                contents = [
                    (place, item.id, part, json.dumps(item.content())) for place, (part, item) in enumerate(items)
                ]
                base.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", contents)
            base.execute("PRAGMA journal_mode = WAL")
            base.close()
            os.link(staged, path)  # fails where another file has the name by now
        except FileExistsError:
            raise InputError(f"{path}: exists already; name another file") from None
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{path}: cannot be written ({error}); make room, or name another place") from None
        finally:
            staged.unlink(missing_ok=True)

    def items(self) -> Iterator[tuple[Part, Item]]:
        """The items with their parts, in the order of the study."""
        with self._reading():
            for part, content in self._base.execute("SELECT part, content FROM items ORDER BY place"):
                yield part, Item.of(json.loads(content))

    def rows(self) -> list[Judgement]:
        """All rows as they came, undone ones and undos among them."""
        with self._reading():
            known = {name for (name,) in self._base.execute("SELECT id FROM items")}
            rows = [_judgement(row) for row in self._base.execute("SELECT * FROM judgements ORDER BY number")]
            for row in rows:
                self._check_row(row, known)
            return rows

    def _check_row(self, row: Judgement, known: set[str]) -> None:
        """Raises a ValueError or the like for a row that this library has not written."""
        if row.item not in known or row.part not in PARTS or not isinstance(row.annotator, str):
            raise ValueError(f"judgement {row.number} is of no item, or of an unknown part")
        if row.undoes is None and sorted(row.shown) != list(range(len(row.shown))):
            raise ValueError(f"judgement {row.number} has an order that is none")
        if row.value is not None:
            self.task.answer(self.task.shown(row.value, row.shown), row.shown)

    def judgements(self) -> list[Judgement]:
        """The rows that stand: neither undos nor what they took back."""
        rows = self.rows()
        undone = {row.undoes for row in rows}
        return [row for row in rows if row.undoes is None and row.number not in undone]

    def add(self, judgements: Sequence[Judgement]) -> list[Judgement]:
        """Adds rows in one step, and returns them with number and time, when all are on the disk.

        Raises: InputError if they could not be written, as on a full disk; then none of them was.
        """
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        added = []
        try:
            with self._base:
                for row in judgements:
                    cells = (
                        *(row.client_id, row.annotator, row.item, row.part, json.dumps(row.shown)),
                        None if row.value is None else json.dumps(row.value),
                        *(row.flag, row.comment, row.seconds, row.undoes, at),
                    )
                    marks = ", ".join("?" * len(cells))
                    number = self._base.execute(f"INSERT INTO judgements VALUES (NULL, {marks})", cells).lastrowid
                    added.append(Judgement(**{**row.__dict__, "number": number, "at": at}))
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: the judgement is not saved ({error}); make room on the disk") from None
        return added

    def close(self) -> None:
        """Closes the file and lets others write to it."""
        if hasattr(self, "_base"):
            self._base.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what a damaged or foreign file leads to into one line."""
        try:
            yield
        except (sqlite3.Error, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError) and str(error).startswith(str(self.path)):
                raise
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{self.path}: cannot be read as a store of judgements ({what}); {_RESTORE}") from None

    def _check(self) -> None:
        [application], [version] = (self._base.execute(f"PRAGMA {name}").fetchone() for name in _MARKS)
        if application != _APPLICATION:
            raise InputError(
                f"{self.path}: is a database, but no store of judgements; name the file that annotate made"
            )
        if version > _FORMAT:
            raise InputError(f"{self.path}: was made by a later version of this package; update it")
        [state] = self._base.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise InputError(f"{self.path}: is damaged ({state}); {_RESTORE}")


_MARKS = ("application_id", "user_version")
_RESTORE = "restore it from a copy, or name another file"


def _connected(path: Path, writing: bool) -> sqlite3.Connection:
    # One thread at a time uses the connection, though not always the same one.
    mode = "rw" if writing else "ro"
    base = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, timeout=30)
    if writing:
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA foreign_keys = ON")
    return base


def _locked(path: Path) -> Any:
    """The open file, which no other process can lock, by whatever name, until it is closed or this process ends."""
    if fcntl is None:
        return None
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); choose another place") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another annotate serves this store; stop it, or name another store") from None
    return file


def is_store(path: str | Path) -> bool:
    """Whether the file begins like an SQLite database."""
    try:
        with open(path, "rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def _judgement(row: Sequence[Any]) -> Judgement:
    number, client_id, annotator, item, part, shown, value, flag, comment, seconds, undoes, at = row
    kept = None if value is None else json.loads(value)
    order = tuple(json.loads(shown))
    return Judgement(client_id, annotator, item, part, order, kept, flag, comment, seconds, undoes, number, at)
