"""Which folder a run gets: no run writes over another, and the newest is the one that goes on."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import outputs
from rlhf_lightning.callbacks.checkpoint_files import staging
from rlhf_lightning.cli import claims
from rlhf_lightning.cli.claims import claimed, first_process
from rlhf_lightning.cli.runs import Run, Wanted, choose, family, free
from rlhf_lightning.errors import InputError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for run folders; what `choose` tells other processes is forgotten after the test."""
    monkeypatch.setenv("RLHF_LIGHTNING_RUN", "")
    return tmp_path / "runs"


def leave(folder: Path, started: float, batches: int = 3) -> Path:
    """What a run leaves that saved after so many batches, 0 for none; returns its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": started}) + "\n", encoding="utf-8")
    checkpoint = folder / "checkpoints" / f"batch-{batches:08d}.ckpt"
    if batches:
        torch.save({}, checkpoint)
    return checkpoint


def wanted(root: Path, name: str | None = "sft", **changes: object) -> Wanted:
    options = {"typed": False, "module": "SFTModule", "checkpoint": None}
    return Wanted(root, name, **{**options, **changes})


# New runs


def test_a_configured_name_is_taken_once_and_numbered_then(root: Path) -> None:
    assert choose(wanted(root)) == Run(root / "sft")
    leave(root / "sft", started=1.0)
    second = choose(wanted(root))
    assert second.folder == root / "sft-2"
    assert second.note == f"{root}/sft holds a run already: this one is {root}/sft-2"
    leave(root / "sft-2", started=2.0)
    leave(root / "sft-9", started=3.0)
    assert choose(wanted(root)).folder == root / "sft-10"


def test_only_folders_that_hold_a_run_count(root: Path) -> None:
    (root / "sft").mkdir(parents=True)
    for name in ("sft-lora", "sft-02", "sft-1", "sft-2-old", "sftx-7"):
        leave(root / name, started=1.0)
    assert choose(wanted(root)).folder == root / "sft"
    leave(root / "sft", started=2.0)
    assert choose(wanted(root)).folder == root / "sft-2"


def test_a_typed_name_that_a_run_has_is_refused(root: Path) -> None:
    leave(root / "mine", started=1.0)
    with pytest.raises(InputError, match=r"mine holds a run already \(checkpoints\).*--ckpt_path last.*--run"):
        choose(wanted(root, "mine", typed=True))
    assert choose(wanted(root, "other", typed=True)).folder == root / "other"


def test_without_a_name_it_is_the_module_and_the_time(root: Path) -> None:
    stage, date, time = choose(wanted(root, None, module="RewardModelModule")).name.split("-")
    assert (stage, len(date), len(time)) == ("reward_model", 8, 6)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", ".hidden", "x" * 201])
def test_a_run_name_is_no_path(root: Path, name: str) -> None:
    with pytest.raises(InputError, match="it names a folder in runs/"):
        choose(wanted(root, name, typed=True))


def test_the_other_processes_take_the_first_ones_folder(root: Path) -> None:
    leave(root / "sft", started=1.0)
    first = choose(wanted(root))
    leave(first.folder, started=2.0)  # the first process is ahead
    assert choose(wanted(root), first=False).folder == first.folder == root / "sft-2"
    again = choose(wanted(root, checkpoint="last"))
    assert choose(wanted(root, checkpoint="last"), first=False).checkpoint == again.checkpoint


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_which_process_is_the_first(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "0")
    assert first_process()
    monkeypatch.setenv(variable, "1")
    assert not first_process()


# Going on


def test_last_is_the_run_that_was_started_last(root: Path) -> None:
    leave(root / "sft", started=1.0)
    checkpoint = leave(root / "sft-2", started=2.0)
    run = choose(wanted(root, checkpoint="last"))
    assert (run.folder, run.checkpoint, run.goes_on) == (root / "sft-2", checkpoint, True)
    assert run.note == f"{root}/sft-2 goes on from batch-00000003.ckpt"
    # The first was removed and made anew.
    (root / "sft" / "metrics.jsonl").write_text('{"time": 5.0}\n', encoding="utf-8")
    assert choose(wanted(root, checkpoint="last")).name == "sft"
    assert [run.name for run in family(root, "sft")] == ["sft-2", "sft"]


def test_last_of_a_module_without_a_name(root: Path) -> None:
    leave(root / "sft-20260131-142501", started=1.0)
    leave(root / "sft-20260131-142502", started=2.0)
    leave(root / "ppo-20260131-142503", started=3.0)
    assert choose(wanted(root, None, checkpoint="last")).name == "sft-20260131-142502"
    leave(root / "sft", started=4.0)
    assert choose(wanted(root, None, checkpoint="last")).name == "sft"


def test_last_of_a_runs_own_config_is_that_run(root: Path) -> None:
    leave(root / "first", started=1.0)
    leave(root / "sft", started=2.0)
    run = choose(wanted(root, None, checkpoint="last", configs=[root / "first" / "config.yaml"]))
    assert run.folder == root / "first"


def test_last_of_a_typed_name_is_that_run(root: Path) -> None:
    leave(root / "sft", started=1.0)
    leave(root / "sft-2", started=2.0)
    assert choose(wanted(root, "sft", typed=True, checkpoint="last")).name == "sft"


def test_last_without_a_run_of_that_name(root: Path) -> None:
    with pytest.raises(
        InputError, match=r"sft/checkpoints holds no whole .*; start without it \(.*runs holds no run with"
    ):
        choose(wanted(root, checkpoint="last"))
    leave(root / "other", started=1.0)
    with pytest.raises(InputError, match=r"sft/checkpoints holds no .*the newest that has one is other, --run other"):
        choose(wanted(root, checkpoint="last"))


def test_last_never_goes_on_with_an_older_run_unasked(root: Path) -> None:
    leave(root / "sft", started=1.0)
    leave(root / "sft-2", started=2.0, batches=0)
    with pytest.raises(InputError, match=r"sft-2/checkpoints holds no whole .*; start .*has one is sft, --run sft"):
        choose(wanted(root, checkpoint="last"))


def test_a_checkpoint_of_a_run_of_that_name_goes_on_there(root: Path) -> None:
    leave(root / "sft", started=1.0)
    checkpoint = leave(root / "sft-2", started=2.0)
    run = choose(wanted(root, checkpoint=str(checkpoint)))
    assert (run.folder, run.goes_on) == (root / "sft-2", True)
    other = leave(root / "dpo", started=3.0)
    run = choose(wanted(root, checkpoint=str(other)))
    assert (run.folder, run.checkpoint, run.goes_on) == (root / "sft-3", other, False)
    with pytest.raises(InputError, match="no such checkpoint"):
        choose(wanted(root, checkpoint=str(root / "none.ckpt")))


def test_only_a_whole_checkpoint_is_gone_on_from(root: Path) -> None:
    checkpoint = leave(root / "sft", started=1.0)
    with pytest.raises(
        InputError, match=r"folder and no checkpoint; its newest .*batch-00000003.ckpt; .*--model.model"
    ):
        choose(wanted(root, checkpoint=str(root / "sft")))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-40])
    for path in (checkpoint, root / "sft" / "metrics.jsonl"):
        with pytest.raises(InputError, match="no whole checkpoint"):
            choose(wanted(root, "dpo", checkpoint=str(path)))


# The folder while it is written to


def test_two_runs_at_once_do_not_share_a_folder(root: Path) -> None:
    with claimed(wanted(root)) as first, claimed(wanted(root)) as second:
        assert (first.name, second.name) == ("sft", "sft-2")
        taken = pytest.raises(InputError, match="--run sft: another process is writing to")
        with taken, claimed(wanted(root, typed=True)):
            pass
        leave(first.folder, started=1.0)
        with (
            pytest.raises(
                InputError,
                match=rf"another process is training it \(process {os.getpid()} on .* since \d{{4}}-.*\); wait",
            ),
            claimed(wanted(root, checkpoint="last")),
        ):
            pass
    with claimed(wanted(root, checkpoint="last")) as again:
        assert again.name == "sft"
    assert not (again.folder / ".held-by").exists()


def test_a_run_that_logged_nothing_leaves_no_folder(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(wanted(root)) as run:
        (run.folder / "config.yaml").touch()
        raise KeyboardInterrupt
    assert not root.exists()
    run.folder.mkdir(parents=True)  # the user's own
    with claimed(wanted(root)):
        pass
    assert run.folder.is_dir()


@pytest.mark.parametrize("step", ["open", "flock"])
def test_a_folder_that_another_run_removes_meanwhile_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    module = os if step == "open" else outputs.fcntl
    plain, calls = getattr(module, step), []

    def after_the_other_has_gone(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            (root / "sft").rmdir()
        return plain(*args)

    monkeypatch.setattr(claims.tempfile, "TemporaryFile", lambda **options: io.BytesIO())  # opens files itself
    monkeypatch.setattr(module, step, after_the_other_has_gone)
    with claimed(wanted(root)) as first, claimed(wanted(root)) as second:
        assert (first.name, second.name) == ("sft", "sft-2")
        assert (root / "sft").is_dir() and len(calls) == 4  # twice the first, then busy, then the second
    assert not root.exists()


def test_a_folder_that_is_always_gone_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "lock", lambda folder: os.open("/", os.O_RDONLY))
    with pytest.raises(InputError, match=r"sft: cannot be written to \(.*\); choose another"), claimed(wanted(root)):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(root: Path) -> None:
    root.mkdir()
    root.chmod(0o500)
    refused = pytest.raises(InputError, match=r"cannot be written to \(Permission denied\); choose another place")
    with refused, claimed(wanted(root)):
        pass


def test_what_a_killed_save_left_goes_before_the_disk_is_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = staging(leave(root / "sft", started=1.0))
    left.mkdir()

    def try_it(folder: Path) -> None:
        if left.exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(claims, "_check_writable", try_it)
    with claimed(wanted(root, checkpoint="last")) as run:
        assert run.goes_on and not left.exists()


def test_a_folder_that_cannot_be_made(root: Path) -> None:
    root.write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot be written to .*--runs FOLDER"), claimed(wanted(root)):
        pass


def test_what_only_measures_leaves_a_trainings_metrics_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "sft", tmp_path / "a.ckpt")
    assert run.within("validate") == run
    run.folder.mkdir()
    (run.folder / "config.yaml").touch()
    inside = run.within("validate")
    assert (inside.folder, inside.checkpoint) == (run.folder / "validate", run.checkpoint)


# What answers or measures


def test_what_a_model_answers_lies_with_the_run_that_left_it(root: Path) -> None:
    leave(root / "ppo", started=1.0)
    (root / "ppo" / "config.yaml").write_text("model: {}\n", encoding="utf-8")
    answers = {"fresh": False, "model": str(root / "ppo" / "model")}
    assert choose(wanted(root, **answers)).folder == root / "ppo"
    assert choose(wanted(root, typed=True, **answers)).folder == root / "sft"
    assert choose(wanted(root, **{**answers, "fresh": True})).folder == root / "sft"
    for other in ("elsewhere/model", "some-hub/model", str(root / "none" / "model"), None):
        assert choose(wanted(root, fresh=False, model=other)).folder == root / "sft"


def test_a_file_that_is_there_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    assert free(path) == path
    for name in ("predictions-2.jsonl", "predictions-3.jsonl"):
        path.touch()
        path = free(tmp_path / "predictions.jsonl")
        assert path.name == name
