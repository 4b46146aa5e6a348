"""The store only grows, loses nothing that it has acknowledged, and refuses files that are not its own."""

import sqlite3
from pathlib import Path

import pytest
from studies import item, judged, store

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.store import Judgement, Store, is_store


def test_a_judgement_is_read_back(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", ["i1", "i2"], guidelines="Be fair.")
    with Store(path, writing=True) as opened:
        [added] = opened.add([judged("c1", "i1", comment="hm", seconds=2.5, flag="odd")])
        assert added.number == 1
        assert added.at.endswith("+00:00")
    with Store(path) as again:
        assert again.rows() == [added]
        assert again.study["guidelines"] == "Be fair."
        assert [(part, found) for part, found in again.items()] == [("real", item("i1")), ("real", item("i2"))]


def test_an_undo_is_a_row_that_takes_one_back(tmp_path: Path) -> None:
    with Store(store(tmp_path / "s.sqlite", ["i1"]), writing=True) as opened:
        [first] = opened.add([judged("c1", "i1")])
        opened.add([Judgement("c2", "ann", "i1", "real", (), undoes=first.number)])
        [again] = opened.add([judged("c3", "i1", "second")])
        assert [row.number for row in opened.rows()] == [1, 2, 3]
        assert opened.judgements() == [again]


def test_rows_can_be_neither_changed_nor_deleted(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    with Store(path, writing=True) as opened:
        opened.add([judged("c1", "i1")])
    base = sqlite3.connect(path)
    for action in ("DELETE FROM judgements", "UPDATE judgements SET value = NULL", "DELETE FROM items"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            base.execute(action)


def test_rows_come_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    with Store(store(tmp_path / "s.sqlite", ["i1"]), writing=True) as opened:
        with pytest.raises(InputError, match="the judgement is not saved"):
            opened.add([judged("c1", "i1"), judged("c1", "i1")])  # a client's id twice
        with pytest.raises(InputError, match="the judgement is not saved"):
            opened.add([judged("c2", "nothing")])  # an item that is not there
        assert opened.rows() == []
        assert len(opened.add([judged("c1", "i1")])) == 1


def test_a_judgement_is_on_the_disk_when_it_is_acknowledged(tmp_path: Path) -> None:
    """Full synchronisation in the write-ahead log: the settings that promise it are on."""
    with Store(store(tmp_path / "s.sqlite", ["i1"]), writing=True) as opened:
        assert opened._base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert opened._base.execute("PRAGMA synchronous").fetchone() == (2,)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_one_process_writes_by_whatever_name(tmp_path: Path, link: str) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    other = tmp_path / "other.sqlite"
    getattr(other, link)(path)
    with Store(path, writing=True), pytest.raises(InputError, match="another annotate serves this store"):
        Store(other, writing=True)


def test_only_its_owner_reads_a_store(tmp_path: Path) -> None:
    assert store(tmp_path / "s.sqlite", ["i1"]).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        'value = \'{"choice": "zzz"}\'',
        "value = '[1]'",
        "value = '{}'",
        "shown = '[]'",
        "shown = '[0, 0]'",
        "part = 'what'",
        "item = 'none'",
    ],
)
def test_a_row_of_another_kind_is_one_line(tmp_path: Path, change: str) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    with Store(path, writing=True) as opened:
        opened.add([judged("c1", "i1")])
    with sqlite3.connect(path) as base:
        base.execute("DROP TRIGGER judgements_UPDATE")
        base.execute(f"UPDATE judgements SET {change}")
    with Store(path) as opened, pytest.raises(InputError, match="cannot be read as a store"):
        opened.judgements()


def test_one_process_writes(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    with Store(path, writing=True), pytest.raises(InputError, match="another annotate serves this store"):
        Store(path, writing=True)
    with Store(path, writing=True) as free:
        free.add([judged("c1", "i1")])
        with Store(path) as reader:  # while another writes
            assert len(reader.rows()) == 1


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with Store(store(tmp_path / "s.sqlite", ["i1"]), writing=True) as opened:
        opened.add([judged("c1", "i1")])
        [pages] = opened._base.execute("PRAGMA page_count").fetchone()
        opened._base.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(InputError, match=r"not saved \(database or disk is full\)"):
            opened.add([judged("c2", "i1", comment="x" * 100_000)])
        opened._base.execute(f"PRAGMA max_page_count = {pages + 1000}")
        opened.add([judged("c3", "i1")])
        assert [row.client_id for row in opened.rows()] == ["c1", "c3"]


def test_files_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such store"):
        Store(tmp_path / "none.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to be read as one " * 20)
    with pytest.raises(InputError, match="cannot be read as a store"):
        Store(text)
    assert not is_store(text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as base:
        base.execute("CREATE TABLE things (name TEXT)")
    assert is_store(foreign)
    with pytest.raises(InputError, match="is a database, but no store of judgements"):
        Store(foreign)


def test_a_torn_store_is_one_line(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", [f"i{n}" for n in range(500)])
    whole = path.read_bytes()
    for size in (100, 5000, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"s\.sqlite: .*(cannot be read as a store|is damaged).*restore it"):
            Store(path)


def test_content_of_another_kind_is_one_line(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    with sqlite3.connect(path) as base:
        base.execute("DROP TRIGGER items_UPDATE")
        base.execute("UPDATE items SET content = '{}'")
    with Store(path) as opened, pytest.raises(InputError, match="cannot be read as a store"):
        list(opened.items())


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    with sqlite3.connect(path) as base:
        base.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="later version of this package"):
        Store(path)


def test_a_store_is_not_made_over_a_file(tmp_path: Path) -> None:
    path = store(tmp_path / "s.sqlite", ["i1"])
    with pytest.raises(InputError, match="exists already"):
        store(path, ["i2"])
    assert [file.name for file in tmp_path.iterdir()] == ["s.sqlite"]
