"""Claims a run's folder for this process, from before the models are loaded until the run ends."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from rlhf_lightning.callbacks.checkpoint_files import clear_staging
from rlhf_lightning.callbacks.slurm import MARK, mark
from rlhf_lightning.cli.runs import HOLDER, UNSAVED, Run, Wanted, choose, free, holder, holds_run
from rlhf_lightning.errors import InputError
from rlhf_lightning.outputs import lock

# Variables in which Lightning, torchrun, SLURM and LSF give a process its rank. (`rank_zero_only` reads them only once,
# when it is imported.)
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_BEFORE_STEPS = ("config.yaml", MARK, HOLDER)  # what a run's folder has before its first step is logged
_TRIES = 100  # attempts to hold a folder that other processes keep removing


def first_process() -> bool:
    """Whether this process is the run's first. Only the first one prints and writes files."""
    ranks = [os.environ.get(name, "0") for name in _RANKS]
    return getattr(rank_zero_only, "rank", 0) == 0 and all(rank == "0" for rank in ranks)


@contextmanager
def claimed(wanted: Wanted) -> Iterator[Run]:
    """Chooses the run of a ``fit``, makes its folder, and locks it against other processes (if the file system can).

    A fit that ends before its first step is logged leaves no folder behind.

    Raises:
        InputError: see `runs.choose`; or the folder cannot be written to, or another process continues this run.
    """
    busy: list[Path] = []
    while True:
        run = choose(wanted, busy=busy)
        existed, held = _hold(run.folder)
        if held is not None and (run.goes_on or run.anew or not holds_run(run.folder)):
            break
        if held is not None:  # another run has used the folder and ended since the name was chosen
            os.close(held)
        elif run.goes_on:
            raise InputError(
                f"{run.folder}: another process is training it{holder(run.folder)}; wait for its end, or stop it"
            )
        else:
            busy.append(run.folder)
    try:
        try:
            clear_staging(run.folder / "checkpoints")  # what a killed save has left may be what fills the disk
            _check_writable(run.folder)
            if run.anew:
                _set_aside(run.folder)
            mark(run.folder, wanted.command)
            _tell_holder(run.folder / HOLDER)
        except OSError as error:
            raise _not_writable(run.folder, str(error.strerror)) from None
        yield run
    finally:
        with suppress(OSError):
            (run.folder / HOLDER).unlink()
        if not existed:
            remove_if_nothing_logged(run.folder)
        os.close(held)


@contextmanager
def cleared_up(folder: Path) -> Iterator[None]:
    """If the body fails, removes the folder if it is new and nothing was logged in it."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            remove_if_nothing_logged(folder)
        raise


def remove_if_nothing_logged(folder: Path) -> None:
    """Removes the folder of a run that ended before its first step was logged: it has only a config and empty logs."""
    if not folder.is_dir():
        return
    files = list(folder.iterdir())
    if all(file.name in _BEFORE_STEPS or file.name.startswith("events.out.tfevents.") for file in files):
        for file in files:
            file.unlink()
        with suppress(OSError):  # if the folder is not empty or is gone, another process uses it by now
            folder.rmdir()
            folder.parent.rmdir()


def _hold(folder: Path) -> tuple[bool, int | None]:
    """Returns whether the folder existed, and the descriptor that holds it now (see `outputs.lock`).

    Another process may end and remove its folder between any two steps. Then all steps are repeated.

    Raises:
        InputError: the folder cannot be written to.
    """
    for _ in range(_TRIES):
        existed = folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder)
            if held is None or _is_still(folder, held):
                return existed, held
            os.close(held)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _not_writable(folder, str(error.strerror)) from None
    raise _not_writable(folder, "another process removes it again and again")


def _tell_holder(path: Path) -> None:
    """Writes for others who holds the folder."""
    path.unlink(missing_ok=True)  # a killed process leaves it; and never write to where a link leads
    path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}\n")


def _set_aside(folder: Path) -> None:
    """Moves what a run without a checkpoint has left into a subfolder, so that no records mix with the new ones."""
    left = [path for path in folder.iterdir() if not path.name.startswith(UNSAVED)]
    aside = free(folder / UNSAVED)
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)


def _not_writable(folder: Path, reason: str) -> InputError:
    remedy = "choose another place with --runs FOLDER, or mend that"
    return InputError(f"{folder}: cannot be written to ({reason}); {remedy}")


def _check_writable(folder: Path) -> None:
    """Writes to the folder, since a failure now is better than one after hours."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(4096))


def _is_still(folder: Path, held: int) -> bool:
    """Whether the descriptor belongs to the folder that exists now, and not to a removed one of the same name."""
    return os.name == "nt" or os.path.samestat(os.fstat(held), os.stat(folder))
