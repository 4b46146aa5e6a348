"""Errors of callbacks and loggers that a user has added are one line that names them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from small_data import SmallData, train

from rlhf_lightning.cli.foreign import CheckMonitors, check_loggers, check_monitors, of_callback
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.modules.sft import SFTModule


class Mailer(Callback):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def on_train_batch_end(self, *args: Any) -> None:
        raise self.error


def raised(model: Path, error: Exception) -> Exception:
    with pytest.raises(type(error)) as caught:
        train(SFTModule(str(model)), SmallData(model, [[0, 1]]), callbacks=[Mailer(error)])
    return caught.value


def test_a_callback_that_fails_is_named_with_its_line(tiny_policy_dir: Path) -> None:
    said = of_callback(raised(tiny_policy_dir, ConnectionError("no server\nat all")))
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "raise self.error" in text)
    assert str(said) == (
        f"trainer.callbacks: Mailer failed in on_train_batch_end (ConnectionError: no server; {__file__}:{line}); "
        "repair it, or leave it out"
    )


@pytest.mark.parametrize("error", [InputError("a row"), TrainingDiverged("NaN"), RuntimeError("can't allocate memory")])
def test_errors_that_have_an_answer_of_their_own_keep_it(tiny_policy_dir: Path, error: Exception) -> None:
    assert of_callback(raised(tiny_policy_dir, error)) is None


def test_errors_of_ours_keep_their_traceback(tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mailer, "__module__", "rlhf_lightning.callbacks.mail")
    assert of_callback(raised(tiny_policy_dir, ValueError())) is None
    assert of_callback(ValueError()) is None


def test_a_logger_that_cannot_start_is_refused(tmp_path: Path) -> None:
    class Service(CSVLogger):
        @property
        @rank_zero_experiment
        def experiment(self) -> Any:
            raise PermissionError("api_key not configured")

    check_loggers([CSVLogger(str(tmp_path))])
    with pytest.raises(InputError, match=r"trainer.logger: Service cannot start \(PermissionError: api_key not"):
        check_loggers([Service(str(tmp_path))])


def test_customary_names_of_metrics_are_refused_where_nobody_logs_them() -> None:
    class Own(SFTModule):
        """May log what it likes."""

    module = SFTModule("model")
    for callback in (EarlyStopping("val_loss"), ModelCheckpoint(monitor="train_loss"), EarlyStopping("loss")):
        with pytest.raises(InputError, match=rf"{type(callback).__name__} watches '{callback.monitor}'.*val/loss"):
            check_monitors([callback], module)
        check_monitors([callback], Own("model"))
        check_monitors([callback, Mailer(ValueError())], module)
    check_monitors([EarlyStopping("val/loss"), EarlyStopping("lr-AdamW"), ModelCheckpoint()], module)


class Count(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize(
    ("monitor", "held_out", "batches", "said"),
    [
        ("val/los", True, 0, r"'val/los' \(did you mean val/loss\?\); the validation of SFTModule logs val/"),
        ("val/loss", False, 0, "'val/loss', and nothing is validated; set data.val_path"),
        ("loss/val", True, 1, "'loss/val'.*; the training of SFTModule logs "),
        ("train/los", False, 1, r"'train/los' \(did you mean train/loss\?\)"),
        ("val/loss", True, 4, ""),
        ("train/loss", False, 4, ""),
        ("lr-AdamW", False, 4, ""),
    ],
)
def test_a_metric_that_there_is_not_is_refused_as_soon_as_that_is_known(
    monitor: str, held_out: bool, batches: int, said: str, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Count, "__module__", "rlhf_lightning.callbacks.count")
    data, count = SmallData(tiny_policy_dir, [[0, 1], [2], [3], [4]], held_out=held_out), Count()
    with pytest.raises(InputError, match=f"EarlyStopping watches {said}") if said else contextlib.nullcontext():
        checks = [EarlyStopping(monitor, strict=False), count, CheckMonitors()]
        train(SFTModule(str(tiny_policy_dir)), data, callbacks=checks)
    assert count.batches == batches


@pytest.mark.parametrize("callback", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize(("monitor", "tried"), [("val/los", True), ("val/perplexity", True), ("val/loss", False)])
def test_a_held_out_name_is_tried_also_without_a_sanity_check(
    callback: Any,
    monitor: str,
    tried: bool,
    tiny_policy_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Trials(Count):
        def on_sanity_check_start(self, *args: Any) -> None:
            self.batches -= 100

    data, count = SmallData(tiny_policy_dir, [[0, 1], [2]], held_out=True), Trials()
    wrong = pytest.raises(InputError, match=rf"{callback.__name__} watches 'val/los' \(did you mean val/loss\?\)")
    with wrong if monitor == "val/los" else contextlib.nullcontext():
        options = {"num_sanity_val_steps": 0, "enable_checkpointing": True, "default_root_dir": tmp_path}
        checks = [callback(monitor=monitor), count, CheckMonitors()]
        train(SFTModule(str(tiny_policy_dir)), data, callbacks=checks, **options)
    assert count.batches == -100 * tried + 2 * (monitor != "val/los")
    said = f"{callback.__name__} watches '{monitor}', which only a validation can tell of: one batch is validated first"
    assert (said in " ".join(capsys.readouterr().out.split())) == tried


def test_a_resumed_run_tells_of_a_held_out_name_at_its_first_validation(tiny_policy_dir: Path, tmp_path: Path) -> None:
    module, data = SFTModule(str(tiny_policy_dir)), SmallData(tiny_policy_dir, [[0, 1], [2]], held_out=True)
    train(module, data, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    (saved,) = tmp_path.glob("*.ckpt")
    checks = [EarlyStopping("val/los", strict=False), CheckMonitors()]
    with pytest.raises(
        InputError, match=r"'val/los' \(did you mean val/loss\?\); the validation of SFTModule logs val/"
    ):
        train(SFTModule(str(tiny_policy_dir)), data, str(saved), callbacks=checks, max_epochs=2, num_sanity_val_steps=0)


def test_metrics_of_modules_that_are_not_ours_are_theirs(tiny_policy_dir: Path) -> None:
    class Own(SFTModule):
        """May log what it likes, and when."""

    data = SmallData(tiny_policy_dir, [[0, 1]])
    train(Own(str(tiny_policy_dir)), data, callbacks=[EarlyStopping("loss/mine", strict=False), CheckMonitors()])
