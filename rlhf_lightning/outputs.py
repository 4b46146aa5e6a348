"""Output files of commands: checks before the work that they may be written, and writes them in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from rlhf_lightning.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


def lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or the process ends; None if another process holds it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor


def check_output(path: str | Path, option: str, inputs: Iterable[str | Path] = ()) -> None:
    """Checks before the work that the file may be written.

    Args:
        path: the file.
        option: the option that names it, for the message.
        inputs: files and folders that the command reads; names that do not exist (hub names) are skipped.

    Raises:
        InputError: it is a folder, a device or a pipe, one of the inputs, or in a folder that cannot be written to.
    """
    given, path = f"{option} {path}", Path(path).absolute()
    place = path.resolve()
    if place.is_dir():
        raise InputError(f"{given}: this is a folder; name a file in it")
    if path.name == "-" or _is_special(path, place):
        raise InputError(
            f"{given}: this is no file but a device or a pipe; name a file, which is written whole at the end"
        )
    if place.exists() and not place.is_file():
        raise InputError(f"{given}: this is no file that can be replaced; name another one")
    for source in (Path(source).expanduser() for source in inputs):
        if place.exists() and source.exists() and (place.samefile(source) or place.is_relative_to(source.resolve())):
            raise InputError(f"{given}: this command reads it ({source}) and would write over it; name another file")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{given}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{given}: no permission to write to {parent}; choose another place")


def check_room(folder: str | Path, needed: int, what: str, remedy: str) -> None:
    """Checks before the work that the disk has room.

    Args:
        folder: the folder to write to; it need not exist yet.
        needed: number of bytes.
        what: subject and verb of the message, as "a checkpoint takes".
        remedy: the end of the message, after "choose".

    Raises:
        InputError: fewer bytes are free.
    """
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    disk = shutil.disk_usage(there)
    if disk.total > 0 and disk.free < needed:  # some network file systems report no sizes
        raise InputError(
            f"{folder}: {disk.free / 1e9:,.1f} GB of the disk are free, and {what} {needed / 1e9:,.1f} GB; make room, "
            f"or choose {remedy}"
        )


def _is_special(path: Path, place: Path) -> bool:
    """Whether the path is a device or a pipe, or a name of a stream that this process has open."""
    # Such a name counts even if a shell has put a regular file behind /dev/stdout.
    open_ones = (Path("/dev/stdin"), Path("/dev/stdout"), Path("/dev/stderr"), Path("/dev/fd"), Path("/proc"))
    if any(part.is_relative_to(name) for part in (path, place) for name in open_ones):
        return True
    return place.is_char_device() or place.is_block_device() or place.is_fifo()


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file, complete and on the disk as soon as it exists. Makes its folders; follows a link.

    A lone surrogate, which a JSON escape may put into a text, has no UTF-8 form and becomes a question mark.
    """
    place = Path(path).resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, place)
    finally:
        staged.unlink(missing_ok=True)
