"""Where a command may write, and that it writes there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import rlhf_lightning
from rlhf_lightning.errors import InputError
from rlhf_lightning.outputs import check_output, check_room, write_whole


def test_what_can_be_written_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.jsonl").write_text("old")
    Path("rows.jsonl").write_text("rows")
    for name in ("new.jsonl", "deep/er/new.jsonl", "old.jsonl"):
        check_output(Path(name), "--output", ["rows.jsonl", "owner/of_a_hub_name", tmp_path / "no_folder"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.jsonl", "rows.jsonl"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no memory disk")
def test_a_file_on_a_memory_disk_is_a_file() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "report.json"
        check_output(path, "--json")
        write_whole(path, "{}")
        check_output(path, "--json")
        assert path.read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/dev/null", "a device or a pipe"),
        ("/dev/stdout", "a device or a pipe"),
        ("/dev/fd/1", "a device or a pipe"),
        ("/proc/self/fd/1", "a device or a pipe"),
        ("-", "a device or a pipe"),
        ("pipe", "a device or a pipe"),
        ("link_to_null", "a device or a pipe"),
        (".", "this is a folder"),
        ("rows.jsonl", "this command reads it"),
        ("link.jsonl", "this command reads it"),
        ("hard.jsonl", "this command reads it"),
        ("model/config.json", "this command reads it"),
        ("rows.jsonl/a.jsonl", "rows.jsonl is a file, not a folder"),
    ],
)
def test_what_cannot_or_must_not_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("rows")
    Path("link.jsonl").symlink_to("rows.jsonl")
    os.link("rows.jsonl", "hard.jsonl")
    Path("link_to_null").symlink_to("/dev/null")
    os.mkfifo("pipe")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    with pytest.raises(InputError, match=said) as caught:
        check_output(name, "--output", ["rows.jsonl", "model"])
    assert str(caught.value).startswith(f"--output {name}: ") and "\n" not in str(caught.value)
    assert Path("rows.jsonl").read_text() == "rows"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("there.txt")
    write_whole(tmp_path / "link.txt", "new \ud800")
    assert (tmp_path / "there.txt").read_text() == "new ?" and (tmp_path / "link.txt").is_symlink()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "there.txt", "newer")
    assert (tmp_path / "there.txt").read_text() == "new ?"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "there.txt"]


def test_a_disk_without_room_is_named_with_what_would_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, disk = [], SimpleNamespace(total=10**12, free=2 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or disk)
    check_room(tmp_path / "new" / "run", 2 * 10**9, "a model takes", "another place")
    said = r"new/run: 2.0 GB of the disk are free, and a model takes 3.0 GB; make room, or choose another place"
    with pytest.raises(InputError, match=said):
        check_room(tmp_path / "new" / "run", 3 * 10**9, "a model takes", "another place")
    assert asked == [tmp_path] * 2
    disk.total = 0  # it knows no sizes
    check_room(tmp_path, 3 * 10**9, "a model takes", "another place")


def test_one_place_asks_for_room() -> None:
    package = Path(rlhf_lightning.__file__).parent
    assert [path.name for path in package.rglob("*.py") if "disk_usage" in path.read_text()] == ["outputs.py"]
