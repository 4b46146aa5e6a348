"""Chooses run folders: ``runs/<run>/`` holds all files of one run, and no run writes over another.

Many runs may want the name that a config gives, or one made of module and time. So the second run with such a name
takes ``NAME-2``. A name typed with ``--run`` is never changed, since other commands will look for it. It is refused if
that folder holds a run already.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rlhf_lightning.callbacks.checkpoint_files import damage, is_whole, latest, newest_intact
from rlhf_lightning.callbacks.slurm import begun_before
from rlhf_lightning.errors import InputError
from rlhf_lightning.outputs import lock

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TIMED = re.compile(r"-\d{8}-\d{6}(-\d+)?")
# Lightning starts the other processes of a run with the same command line, some seconds later. This variable tells them
# the first process's folder. (torchrun starts all at once: they choose before the first process writes anything.)
_SHARED = "RLHF_LIGHTNING_RUN"
HOLDER = ".held-by"  # in the folder of a run that a process is writing to: which one
UNSAVED = "unsaved"  # in the folder of a run that began anew: what was there before
_SHARED_CHECKPOINT = "RLHF_LIGHTNING_CHECKPOINT"  # and its checkpoint; empty for none


@dataclass(frozen=True)
class Wanted:
    """What the command line and the config say about the run.

    Args:
        root: the folder of the run folders.
        name: ``run``; None to make a name of the module and the time.
        typed: whether the name was given on the command line.
        module: name of the module's class.
        checkpoint: ``--ckpt_path``; ``last`` for the newest of the run.
        configs: the config files.
        fresh: whether the command (``fit``) needs a new folder unless it continues a run.
        command: the command line, by which a requeued SLURM job finds its run again.
        model: the model's folder; commands that only measure or answer write into the run that made the model.
    """

    root: Path
    name: str | None
    typed: bool
    module: str
    checkpoint: str | None
    configs: Sequence[Path] = ()
    fresh: bool = True
    model: str | None = None
    command: str = ""

    @property
    def stage(self) -> str:
        """``reward_model`` for ``RewardModelModule``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.module.removesuffix("Module")).lower()


@dataclass(frozen=True)
class Run:
    """The folder of a run, the checkpoint that it starts from, and a note about them to print ("" for none)."""

    folder: Path
    checkpoint: Path | None = None
    note: str = ""
    goes_on: bool = False  # whether it continues from a checkpoint of its own
    anew: bool = False  # whether it begins again in a folder that holds a run without a checkpoint

    @property
    def name(self) -> str:
        return self.folder.name

    def within(self, stage: str) -> Run:
        """The run as a stage that only measures sees it: in a training's folder it writes to a subfolder."""
        if not (self.folder / "config.yaml").exists():
            return self
        folder = self.folder / stage
        return replace(self, folder=folder, note=f"the metrics are written to {folder}")


def choose(wanted: Wanted, first: bool = True, busy: Sequence[Path] = ()) -> Run:
    """The run's folder and checkpoint.

    Args:
        wanted: what the user asked for.
        first: False for a process that the run's first process started; it takes that process's folder.
        busy: folders that other runs are about to use.

    Raises:
        InputError: the name is not valid, the checkpoint does not exist, or another run has the typed name.
    """
    if wanted.name is not None and not _NAME.fullmatch(wanted.name):
        raise InputError(
            f"--run {wanted.name}: use letters, digits, dots, dashes, underscores, at most 200; "
            "it names a folder in runs/"
        )
    if not first and _SHARED in os.environ:
        checkpoint = os.environ[_SHARED_CHECKPOINT]
        return Run(Path(os.environ[_SHARED]), Path(checkpoint) if checkpoint else None)
    run = _requeued(wanted)
    if run is None:
        run = _newest(wanted) if wanted.checkpoint == "last" else _by_name(wanted, busy)
    if first:
        os.environ[_SHARED], os.environ[_SHARED_CHECKPOINT] = str(run.folder), str(run.checkpoint or "")
    return run


def holds_run(folder: Path) -> str | None:
    """A file or folder that a run has left in the folder; None if no run has used it."""
    return next((name for name in ("checkpoints", "model", "metrics.jsonl") if (folder / name).exists()), None)


def free(path: Path) -> Path:
    """The path, or the first of ``NAME-2.jsonl``, ``NAME-3.jsonl``, ... that does not exist yet."""
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def family(root: Path, name: str) -> list[Path]:
    """The runs ``NAME``, ``NAME-2``, ``NAME-3``, ... in ``root``, sorted by their start."""
    return sorted((path for path in _folders(root) if _number(path, name) and holds_run(path)), key=started)


def _number(folder: Path, name: str) -> int:
    """1 for ``NAME``, 2 for ``NAME-2``, ...; 0 for other names."""
    if folder.name == name:
        return 1
    digits = folder.name.removeprefix(f"{name}-")
    return int(digits) if digits != folder.name and re.fullmatch(r"[2-9]|[1-9]\d{1,5}", digits) else 0


def started(run: Path) -> tuple[float, str]:
    """The time of a run's first metrics, and its name. (Times of files would change when the folder is copied.)"""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            return float(json.loads(file.readline(1 << 20))["time"]), run.name
    except (OSError, ValueError, KeyError, TypeError):
        config = run / "config.yaml"
        return config.stat().st_mtime if config.exists() else 0.0, run.name


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:  # missing or unreadable; a later check asks whether it can be written to
        return []


def _by_name(wanted: Wanted, busy: Sequence[Path]) -> Run:
    checkpoint = _given(wanted.checkpoint)
    name = wanted.name or f"{wanted.stage}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = wanted.root / name
    if checkpoint is not None:
        # A run continues from its own checkpoint. A checkpoint of another run starts a new one.
        runs = [folder] if wanted.typed else family(wanted.root, name)
        found = next((path for path in runs if checkpoint.resolve().is_relative_to(path.resolve())), None)
        if found is not None:
            note = "" if found == folder else f"{found} goes on from {checkpoint.name}"
            return Run(found, checkpoint, note, goes_on=True)
    if not wanted.fresh and not wanted.typed and wanted.model is not None:
        maker = Path(wanted.model).parent
        return Run(maker if (maker / "config.yaml").is_file() and holds_run(maker) else folder, checkpoint)
    left = holds_run(folder)
    if not wanted.fresh or not (left or folder in busy):
        return Run(folder, checkpoint)
    if wanted.typed:
        if not left:
            raise InputError(f"--run {name}: another process is writing to {folder}; choose another name")
        if using := _in_use(folder):
            raise InputError(f"{folder} holds a run already{using}; choose another name with --run")
        raise InputError(
            f"{folder} holds a run already ({left}); continue it with --ckpt_path last, choose another name with "
            "--run, or remove the folder"
        )
    last = max(_number(path, name) for path in [folder, *family(wanted.root, name), *busy])
    fresh = wanted.root / f"{name}-{last + 1}"
    return Run(fresh, checkpoint, f"{folder} holds a run already: this one is {fresh}")


def _requeued(wanted: Wanted) -> Run | None:
    """The run to go on with in a SLURM job that was requeued: the one that the job began. None if there is none."""
    if not wanted.fresh or wanted.checkpoint not in (None, "last"):
        return None
    for run in reversed([run for run in _candidates(wanted) if begun_before(run, wanted.command)]):
        if (checkpoint := newest_intact(run / "checkpoints")[0]) is not None:
            return Run(run, checkpoint, f"{run} goes on from {checkpoint.name}: SLURM's job was requeued", goes_on=True)
        why = f"SLURM's job was requeued before its first checkpoint; what it left is in {free(run / UNSAVED)}"
        return Run(run, note=f"{run} begins anew: {why}", anew=True)
    return None


def _candidates(wanted: Wanted) -> list[Path]:
    """The runs of the name that was typed or configured, or else of the module's kind, the newest last."""
    if wanted.typed and wanted.name is not None:  # --run null is typed, and no name
        return [wanted.root / wanted.name]
    if (of_config := _run_of_config(wanted)) is not None:
        return [of_config]
    if wanted.name is not None:
        return family(wanted.root, wanted.name)
    timed = [path for path in _folders(wanted.root) if _TIMED.fullmatch(path.name.removeprefix(wanted.stage))]
    return sorted([*family(wanted.root, wanted.stage), *timed], key=started)


def _newest(wanted: Wanted) -> Run:
    """The newest run to continue."""
    runs = [run for run in _candidates(wanted) if holds_run(run)] or [wanted.root / (wanted.name or wanted.stage)]
    run = runs[-1]
    checkpoint, damaged = newest_intact(run / "checkpoints")
    if checkpoint is None:
        # An older run is never chosen unasked, since continuing it would write to it.
        which = f" ({'; '.join(damaged)})" if damaged else ""
        instead = f"start anew with another --run, or remove {run}" if holds_run(run) else "start without it"
        raise InputError(
            f"--ckpt_path last: {run / 'checkpoints'} holds no whole checkpoint{which}{_in_use(run)}; {instead}"
            f"{_known_runs(wanted.root)}"
        )
    older = f"; newer ones are damaged ({'; '.join(damaged)})" if damaged else ""
    return Run(run, checkpoint, f"{run} goes on from {checkpoint.name}{older}", goes_on=True)


def _run_of_config(wanted: Wanted) -> Path | None:
    """The run whose own ``config.yaml`` is among the configs; None if there is none, or a name is given."""
    runs = [path.parent for path in wanted.configs if path.name == "config.yaml" and holds_run(path.parent)]
    return runs[-1] if runs and wanted.name is None else None


def _given(checkpoint: str | None) -> Path | None:
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if not path.exists():
        raise InputError(f"--ckpt_path {path}: no such checkpoint; give its path, or `last` for the newest one")
    if not is_whole(path):
        if path.is_dir():
            found = latest(path / "checkpoints")
            there = f"; its newest checkpoint is {found}" if found else ""
            raise InputError(
                f"--ckpt_path {path}: this is a folder and no checkpoint{there}; a model's folder is given as "
                "--model.model"
            )
        raise InputError(
            f"--ckpt_path {path}: this is no whole checkpoint: another kind of file, or one that is cut off; take "
            "another of the run's checkpoints/batch-*.ckpt, or `last` for the newest whole one"
        )
    if said := damage(path):
        raise InputError(
            f"--ckpt_path {path}: this checkpoint is damaged ({said}); take another of the run's "
            "checkpoints/batch-*.ckpt, or `last` for the newest whole one"
        )
    return path


def holder(folder: Path) -> str:
    """What the process that holds a run's folder has written about itself; empty if it has written nothing."""
    try:
        return f" ({(folder / HOLDER).read_text(encoding='utf-8').strip()[:200]})"
    except (OSError, UnicodeDecodeError):
        return ""


def _in_use(folder: Path) -> str:
    """For a message: that another process is training the run, and which; empty if none is."""
    if not folder.is_dir():
        return ""
    if (held := lock(folder)) is not None:
        os.close(held)
        return ""
    return f", which another process is training{holder(folder)}"


def _known_runs(root: Path) -> str:
    runs = sorted((path for path in _folders(root) if latest(path / "checkpoints")), key=started)
    if not runs:
        return f" ({root} holds no run with checkpoints)"
    return f", or name a run: the newest that has one is {runs[-1].name}, --run {runs[-1].name}"
