"""However a run is stopped, the resumed one ends as the uninterrupted one: weights, records, counts."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import results_of
from stop_cases import CASES, Killed, KilledAfterSave, Signal, StopAfter, counts, fit, records, resume, steps

from rlhf_lightning.callbacks import stop_signals
from rlhf_lightning.callbacks.checkpoint_files import latest
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.loop_position import reopen
from rlhf_lightning.callbacks.stop_signals import StopSignals
from rlhf_lightning.models.sharding import full_state_dict
from rlhf_lightning.modules.sft import SFTModule


def same(straight: Path, broken: Path) -> None:
    a, b = (torch.load(latest(run / "checkpoints"), weights_only=True) for run in (straight, broken))
    assert latest(straight / "checkpoints").name == latest(broken / "checkpoints").name
    for name, value in a["state_dict"].items():
        assert torch.equal(b["state_dict"][name], value), name
    for index, state in a["optimizer_states"][0]["state"].items():
        assert all(torch.equal(b["optimizer_states"][0]["state"][index][key], value) for key, value in state.items())
    assert a.get("on_policy") == b.get("on_policy")
    assert records(broken) == records(straight)
    assert counts(broken) == counts(straight)


@pytest.fixture(scope="module")
def straight(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of an uninterrupted run, made once for each case and its options."""
    made: dict[str, Path] = {}

    def of(case: str, **options: Any) -> Path:
        key = f"{case}{sorted(options.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "straight"
            fit(case, tiny_policy_dir, made[key], **options)
        return made[key]

    return of


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Lightning leaves SIGINT ignored after an interrupt."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# `make test-faults` runs every case with every stop; the test command runs each case and each stop at least once.
WHOLE = os.environ.get("RLHF_LIGHTNING_FAULTS") == "whole"
# Within an epoch, with a validation due and without; at an epoch's end; within the second epoch.
PLACES = [3, 4, 6, 9]
EVERY = list(itertools.product(CASES, PLACES))
SOME = [("sft", 3), ("sft", 6), ("sft-lora", 9), ("reward_model", 4), ("dpo", 9), ("ppo", 4), ("grpo", 3)]


@pytest.mark.parametrize(("case", "batches"), EVERY if WHOLE else [*SOME, ("online_dpo", 9)])
def test_an_earlier_end_can_be_moved(
    case: str, batches: int, straight: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    options = {"schedule": "constant"}
    fit(case, tiny_policy_dir, tmp_path / "broken", max_steps=steps(case, batches), **options)
    assert latest(tmp_path / "broken" / "checkpoints").name < "batch-00000011.ckpt"
    resume(case, tiny_policy_dir, tmp_path / "broken", **options)
    same(straight(case, **options), tmp_path / "broken")


@pytest.mark.parametrize("case", ["sft", "ppo"])
def test_a_later_end_trains_what_is_missing(case: str, straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"schedule": "constant"}
    shorter = {"iterations": 5} if case == "ppo" else {"max_epochs": 1}
    fit(case, tiny_policy_dir, tmp_path / "broken", **shorter, **options)
    resume(case, tiny_policy_dir, tmp_path / "broken", **options)
    same(straight(case, **options), tmp_path / "broken")


@pytest.mark.parametrize(
    ("case", "batches"), EVERY if WHOLE else [("sft", 4), ("sft", 6), ("reward_model", 3), ("ppo", 3)]
)
def test_max_time_within_an_epoch_loses_nothing(
    case: str, batches: int, straight: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    fit(case, tiny_policy_dir, tmp_path / "broken", StopAfter(batches))
    resume(case, tiny_policy_dir, tmp_path / "broken")
    same(straight(case), tmp_path / "broken")


@pytest.mark.parametrize("stop", ["max_time", "SIGTERM"])
def test_a_stop_waits_for_the_optimizer_step(stop: str, straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    ends = StopAfter(4) if stop == "max_time" else Signal(4, signal.SIGTERM, "on_train_batch_start")
    with contextlib.suppress(SystemExit):
        fit("sft", tiny_policy_dir, tmp_path / "broken", ends, **options)
    assert latest(tmp_path / "broken" / "checkpoints").name == "batch-00000006.ckpt"
    resume("sft", tiny_policy_dir, tmp_path / "broken", **options)
    same(straight("sft", **options), tmp_path / "broken")


def test_a_later_max_steps_begins_the_next_epoch(straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"schedule": "constant"}
    fit("sft", tiny_policy_dir, tmp_path / "broken", max_steps=6, **options)
    resume("sft", tiny_policy_dir, tmp_path / "broken", max_steps=12, **options)
    same(straight("sft", **options), tmp_path / "broken")


def test_a_stop_that_a_module_wishes_makes_no_validation_that_is_not_due(
    straight: Any, tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: SFTModule, *args: Any) -> None:
        self.trainer.should_stop = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 3

    with monkeypatch.context() as patched:
        patched.setattr(SFTModule, "on_train_batch_end", stop)
        fit("sft", tiny_policy_dir, tmp_path / "broken")
    resume("sft", tiny_policy_dir, tmp_path / "broken")
    same(straight("sft"), tmp_path / "broken")


# In a batch, in the validation after it, and in a rollout: case, hook, batch, batches in the checkpoint.
SIGNALS = [
    ("sft", "on_before_optimizer_step", 3, 3, signal.SIGINT),
    ("sft", "on_before_optimizer_step", 6, 6, signal.SIGTERM),
    ("sft", "on_validation_start", 4, 4, signal.SIGTERM),
    ("sft", "on_validation_start", 12, 12, signal.SIGINT),
    ("ppo", "on_phase", 4, 3, signal.SIGINT),
    ("ppo", "on_validation_start", 8, 8, signal.SIGUSR1),
]
ALL_SIGNALS = [
    (case, hook, batch, batch - (hook == "on_phase"), number)
    for case, (hook, batch), number in itertools.product(
        CASES,
        [
            ("on_before_optimizer_step", 3),
            ("on_before_optimizer_step", 6),
            ("on_validation_start", 4),
            ("on_validation_start", 12),
            ("on_phase", 4),
        ],
        [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1],
    )
    if hook != "on_phase" or "iterations" in CASES[case][1]
]


@pytest.mark.parametrize(("case", "hook", "batches", "saved", "number"), ALL_SIGNALS if WHOLE else SIGNALS)
def test_a_signal_saves_where_it_comes(
    case: str,
    hook: str,
    batches: int,
    saved: int,
    number: int,
    straight: Any,
    tiny_policy_dir: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit):
        fit(case, tiny_policy_dir, tmp_path / "broken", Signal(batches, number, hook))
    assert latest(tmp_path / "broken" / "checkpoints").name == f"batch-{saved:08d}.ckpt"
    resume(case, tiny_policy_dir, tmp_path / "broken")
    same(straight(case), tmp_path / "broken")


def test_a_signal_in_an_epochs_first_rollout_begins_that_epoch_again(
    straight: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    options = {"iterations": 6, "max_epochs": 2}
    with pytest.raises(SystemExit):
        fit("grpo", tiny_policy_dir, tmp_path / "broken", Signal(7, signal.SIGTERM, "on_phase"), **options)
    resume("grpo", tiny_policy_dir, tmp_path / "broken", **options)
    same(straight("grpo", **options), tmp_path / "broken")


def test_a_signal_in_a_validation_before_the_optimizer_step_waits_for_the_step(
    straight: Any, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": 3}
    with pytest.raises(SystemExit):
        fit("sft", tiny_policy_dir, tmp_path / "broken", Signal(4, signal.SIGTERM, "on_validation_start"), **options)
    assert latest(tmp_path / "broken" / "checkpoints").name == "batch-00000006.ckpt"
    resume("sft", tiny_policy_dir, tmp_path / "broken", **options)
    same(straight("sft", **options), tmp_path / "broken")


def test_the_last_validation_under_max_steps_is_finished(straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    options = {"max_steps": 12, "max_epochs": -1}
    with pytest.raises(SystemExit):
        fit("sft", tiny_policy_dir, tmp_path / "broken", Signal(12, signal.SIGTERM, "on_validation_start"), **options)
    assert records(tmp_path / "broken") == records(straight("sft", **options))


def test_a_second_fit_of_the_same_callback_starts_afresh_and_handlers_are_as_before(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    checkpoint = RunCheckpoint(every_n_batches=2)
    fit("sft", tiny_policy_dir, tmp_path / "one", StopAfter(3), checkpoint=checkpoint)
    with pytest.raises(SystemExit):
        fit("sft", tiny_policy_dir, tmp_path / "two", Signal(3, signal.SIGTERM), checkpoint=checkpoint)
    module = fit("sft", tiny_policy_dir, tmp_path / "three", checkpoint=checkpoint)
    assert module.trainer.global_step == 12
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = StopSignals()

    def largest(number: int) -> int:
        signals._handle(signal.SIGTERM, None)
        return number

    monkeypatch.setattr(stop_signals, "largest", largest)
    assert not signals.agreed()
    assert signals.agreed()
    with pytest.raises(SIGTERMException):
        signals.stop()


# Whether an epoch of 6 batches that Lightning counts as done is gone on with: the batches done of it, the batches that
# an epoch has now, whether its last batch came.
@pytest.mark.parametrize(
    ("done", "batches", "last", "expected"),
    [(3, 6, False, True), (6, 6, True, False), (6, 9, True, True), (6, float("inf"), True, False),
     (3, float("inf"), False, True), (0, 6, False, False)],
)  # fmt: skip
def test_only_an_epoch_with_missing_batches_is_gone_on_with(
    done: int, batches: float, last: bool, expected: bool
) -> None:
    def both(count: int) -> dict[str, dict[str, int]]:
        return {
            part: dict.fromkeys(("ready", "started", "processed", "completed"), count) for part in ("total", "current")
        }

    progress = {
        "epoch_progress": both(1),
        "epoch_loop.batch_progress": {**both(done), "is_last_batch": last},
        "epoch_loop.state_dict": {"_batches_that_stepped": done},
    }
    assert reopen(progress, batches) == expected
    assert progress["epoch_progress"]["current"]["processed"] == (0 if expected else 1)


def test_two_interruptions_in_one_run(straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit("ppo", tiny_policy_dir, tmp_path / "broken", Signal(4, signal.SIGTERM, "on_validation_start"))
    with pytest.raises(SystemExit):
        resume("ppo", tiny_policy_dir, tmp_path / "broken", Signal(6, signal.SIGTERM, "on_phase"))
    resume("ppo", tiny_policy_dir, tmp_path / "broken")
    same(straight("ppo"), tmp_path / "broken")


@pytest.mark.parametrize("case", CASES if WHOLE else ["sft", "ppo"])
def test_a_kill_after_a_save_loses_no_record(case: str, straight: Any, tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(case, tiny_policy_dir, tmp_path / "broken", checkpoint=KilledAfterSave(every_n_batches=2))
    resume(case, tiny_policy_dir, tmp_path / "broken")
    same(straight(case), tmp_path / "broken")


# Method, strategy, what stops the run; of a signal also where it comes and to which process.
IN_TWO: list[tuple[Any, ...]] = [
    ("sft", "ddp", signal.SIGTERM, "on_before_optimizer_step", 1),
    ("sft", "ddp", "SIGKILL"),
    ("sft", "ddp", "max_steps"),
    ("sft", "fsdp2", signal.SIGUSR1, "on_validation_start", 0),
    ("ppo", "fsdp2", signal.SIGINT, "on_before_optimizer_step", 1),
    ("ppo", "fsdp2", signal.SIGTERM, "on_phase", 1),
]
if WHOLE:
    for method, strategy in itertools.product(CASES, ["ddp", "fsdp2"]):
        IN_TWO += [(method, strategy, stop) for stop in ("max_steps", "max_time", "SIGKILL")]
        IN_TWO += [
            (method, strategy, number, hook, to)
            for number, to in ((signal.SIGTERM, 0), (signal.SIGINT, 1))
            for hook in ("on_before_optimizer_step", "on_validation_start", "on_phase")
            if hook != "on_phase" or "iterations" in CASES[method][1]
        ]
    IN_TWO = list(dict.fromkeys(IN_TWO))


def named(stopped: tuple[Any, ...]) -> str:
    return "-".join(str(part) for part in stopped)


@pytest.fixture(scope="module")
def in_two(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The results of one method under one strategy, stopped in every way and not at all, in the same two processes."""
    made: dict[tuple[str, str], dict[str, Any]] = {}

    def of(method: str, strategy: str) -> dict[str, Any]:
        if (method, strategy) not in made:
            folder = tmp_path_factory.mktemp("two")
            shared = {"model": str(tiny_policy_dir), "method": method, "strategy": strategy}
            cases: dict[str, dict[str, Any]] = {"straight": {**shared, "run": str(folder / "straight")}}
            for stopped in (stopped for stopped in IN_TWO if stopped[:2] == (method, strategy)):
                how = dict(zip(("stop", "hook", "to"), stopped[2:], strict=False))
                cases[named(stopped)] = {**shared, **how, "batches": 4, "run": str(folder / named(stopped))}
                if how["stop"] == "max_steps":  # for an end that is moved
                    constant = {"options": {"schedule": "constant"}}
                    cases[named(stopped)] |= constant
                    cases["straight-max_steps"] = {**cases["straight"], **constant, "run": f"{folder}/constant"}
            made[method, strategy] = results_of("stop_cases.py", cases, folder)
        return made[method, strategy]

    return of


@pytest.mark.parametrize("stopped", IN_TWO, ids=named)
def test_two_processes_that_are_stopped_go_on_as_if_they_were_not(stopped: tuple[Any, ...], in_two: Any) -> None:
    method, strategy, stop, *_ = stopped
    results = in_two(method, strategy)
    expected, got = results["straight-max_steps" if stop == "max_steps" else "straight"], results[named(stopped)]
    assert all(torch.equal(got["weights"][key], value) for key, value in expected["weights"].items())
    assert got["records"] == expected["records"]


# The processes of the first attempt and of the second.
CHANGES = {"ddp": [(1, 2), (2, 1)], "fsdp2": [(1, 2), (2, 1), (1, 4), (4, 2)]}


@pytest.mark.parametrize(
    ("method", "strategy", "first", "second"),
    [(case, strategy, *change) for case in CASES for strategy in CHANGES for change in CHANGES[strategy]]
    if WHOLE
    else [("sft", "ddp", 1, 2), ("ppo", "fsdp2", 4, 1)],
)
def test_the_number_of_processes_may_change(
    method: str, strategy: str, first: int, second: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    def train(count: int, name: str, goes_on: bool = False, **options: Any) -> dict[str, torch.Tensor]:
        options["schedule"] = "constant"
        if count > 1:
            case = {"model": str(tiny_policy_dir), "method": method, "strategy": strategy, "run": str(tmp_path / name)}
            cases = {"it": {**case, "goes_on": goes_on, "options": options}}
            return results_of("stop_cases.py", cases, tmp_path, count)["it"]["weights"]
        try:
            attempt = resume if goes_on else fit
            module = attempt(method, tiny_policy_dir, tmp_path / name, strategy=strategy, **options)
            return {key: value.clone() for key, value in full_state_dict(module.model).items()}
        finally:
            torch.distributed.destroy_process_group()

    straight = train(1, "straight")
    train(first, "changed", max_steps=steps(method, 6))
    changed = train(second, "changed", goes_on=True)
    for name, value in straight.items():
        torch.testing.assert_close(changed[name], value, atol=2e-4, rtol=1e-3, msg=name)
