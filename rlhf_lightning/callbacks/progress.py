"""How far a run is: one live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from jsonargparse.typing import PositiveFloat
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.text import Text

_SHOWN = ("train/loss", "objective/scores", "objective/kl", "val/loss", "val/accuracy")


class RunProgress(ProgressBar):
    """Epoch, batch, phase (rollout, score, update ...), the main metrics, tokens/s and the time that is left.

    In a terminal it is one line that changes in place; elsewhere (a log file, CI) a plain line without control codes is
    printed every so often.

    Args:
        every_seconds: between two plain lines.
    """

    def __init__(self, every_seconds: PositiveFloat = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.console = Console()
        self._live: Live | None = None
        self._enabled = True
        self._stage = ""
        self._phase = ""
        self._done = self._total = 0  # batches: of the whole fit, or of this validation
        self._began_at = 0  # batches done when this process started counting time
        self._began = self._printed = time.monotonic()
        self._epoch = ""
        self._metrics: dict[str, float] = {}

    # What Trainer asks of a progress bar

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (processes other than the first)."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        batches = trainer.num_training_batches * max(1, trainer.max_epochs or 1)
        if trainer.max_steps > 0 and pl_module.automatic_optimization:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._begin("train", int(batches) if batches != float("inf") and trainer.max_epochs != -1 else 0, done)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """One batch more."""
        self._stage, self._phase = "train", ""
        self._done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._epoch = f"epoch {trainer.current_epoch + 1}" + (
            f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
        )
        self._take_metrics(trainer)
        self._show(last=self._total > 0 and self._done >= self._total)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within a fit, validation is a phase; alone, it is the stage."""
        if trainer.state.fn == "validate":
            self._begin("validate", int(sum(trainer.num_val_batches)), 0)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """One validation batch more."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "validate":
            self._done = batch_idx + 1
            self._show()
        else:
            self.on_phase(trainer, pl_module, "validation", batch_idx + 1, int(sum(trainer.num_val_batches)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The phase is over, its metrics are new."""
        self._phase = ""
        self._take_metrics(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._begin("predict", int(sum(trainer.num_predict_batches)), 0)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """One batch more."""
        self._phase = ""
        self._done = batch_idx + 1
        self._show(last=self._done == self._total)

    def on_phase(self, trainer: Trainer, module: LightningModule, phase: str, done: int, total: int) -> None:
        """A module tells how far a part of its step is."""
        if getattr(trainer, "sanity_checking", False):
            return
        self._phase = f"{phase} {done}/{total}"
        self._show()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Lines above the live one (`LightningModule.print`)."""
        self.console.print(*args, markup=False, highlight=False)

    # The line

    def line(self) -> str:
        """What is shown, as plain text."""
        parts = [f"{self._stage} {self._done}" + (f"/{self._total}" if self._total else "")]
        parts += [part for part in (self._epoch, self._phase) if part]
        parts += [f"{name.split('/')[-1]} {value:.4g}" for name, value in self._metrics.items() if name in _SHOWN]
        rate = next((v for name, v in self._metrics.items() if name.endswith("tokens_per_second")), None)
        if rate is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        if (left := self._seconds_left()) is not None:
            parts.append(f"{_clock(left)} left")
        return " | ".join(parts)

    def _seconds_left(self) -> float | None:
        counted = self._done - self._began_at
        if counted < 1 or self._total == 0:
            return None
        return (time.monotonic() - self._began) / counted * max(0, self._total - self._done)

    def _begin(self, stage: str, total: int, done: int) -> None:
        self._stage, self._total, self._done, self._began_at = stage, total, done, done
        self._phase = self._epoch = ""
        self._began = self._printed = time.monotonic()

    def _take_metrics(self, trainer: Trainer) -> None:
        self._metrics = {name: float(value) for name, value in trainer.logged_metrics.items()} | {
            name: float(value) for name, value in trainer.callback_metrics.items() if name in _SHOWN
        }

    def _show(self, last: bool = False) -> None:
        if not self._enabled:
            return
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, get_renderable=lambda: Text(self.line()), refresh_per_second=4)
                self._live.start()
        elif last or time.monotonic() - self._printed >= self.every_seconds:
            self._printed = time.monotonic()
            print(self.line(), flush=True)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
