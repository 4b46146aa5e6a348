"""How far a run is: one live line in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any

from jsonargparse.typing import PositiveFloat
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlhf_lightning.text import say

# What is shown, the more important first: its name, the training's metric and the held-out data's.
_SHOWN = (
    ("loss", "train/loss", "val/loss"),
    ("score", "objective/scores", "val/scores"),
    ("kl", "objective/kl", None),
    ("accuracy", None, "val/accuracy"),
)
_METRICS = {metric for _, *metrics in _SHOWN for metric in metrics}


class RunProgress(ProgressBar):
    """How far the run is, its phase (rollout, score, update ...), the main metrics, tokens/s and the time that is left.

    In a terminal it is one line that changes in place, and leaves out what does not fit; elsewhere (a log file, CI) a
    whole line without control codes is printed after the first batch, after every validation, at the end, and every so
    often in between.

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
        self._done = self._total = 0  # batches: of the whole run, or of this validation
        self._began_at = 0  # batches done when this process started counting time
        self._began = self._printed = time.monotonic()
        self._told = -1  # batches done when the last plain line was printed
        self._epoch = ""
        self._metrics: dict[str, float] = {}
        self._timer: Timer | None = None  # of trainer.max_time

    # What Trainer asks of a progress bar

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (processes other than the first)."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)  # type: ignore[attr-defined]
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._begin("train", _batches_of_run(trainer, pl_module), done)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """One batch more."""
        self._stage, self._phase = "train", ""
        self._done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epochs = trainer.max_epochs or 0
        self._epoch = "" if epochs == 1 else f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        self._take_metrics(trainer)
        self._show(now=self._done == self._began_at + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The line that stays has no phase; a plain one is there already where the end is a validation."""
        self._phase = ""
        if self._told != self._done:
            self._show(now=True)

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
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(now=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._begin("predict", int(sum(trainer.num_predict_batches)), 0)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """One batch more."""
        self._phase = ""
        self._done = batch_idx + 1
        self._show(now=self._done == self._total)

    def on_phase(self, trainer: Trainer, module: LightningModule, phase: str, done: int, total: int) -> None:
        """A module tells how far a part of its step is."""
        if getattr(trainer, "sanity_checking", False):
            return
        if phase == "rollout" and module is not None and module.automatic_optimization:
            # It learns from no rollouts: these are answers, or the samples that are shown after a validation.
            phase = "samples" if trainer.state.fn == "fit" else "tokens"
        self._phase = f"{phase} {done}/{total}" if done < total else ""
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

    def line(self, width: int | None = None) -> str:
        """What is shown, as plain text; of at most ``width`` characters, where more is left out that matters less."""
        count = f"{self._stage} {self._done}" + (f"/{self._total}" if self._total else "")
        rate = next((v for name, v in self._metrics.items() if name.endswith("tokens_per_second")), None)
        left = self._seconds_left()
        measured = [text for shown in _SHOWN if (text := self._measured(*shown))]
        # In the order of the line; the number says what goes last where space is short.
        parts = [(0, count), (8, self._epoch), (3, self._phase)]
        parts += [(2 if number == 0 else 4 + number, text) for number, text in enumerate(measured)]
        parts += [
            (9, "" if rate is None else f"{rate:,.0f} tok/s"),
            (1, "" if left is None else f"{_clock(left)} left"),
        ]
        parts = [part for part in parts if part[1]]
        while width is not None and len(parts) > 1 and len(_joined(parts)) > width:
            parts.remove(max(parts, key=lambda part: part[0]))
        return _joined(parts)

    def _measured(self, name: str, train: str | None, held_out: str | None) -> str:
        one, other = self._metrics.get(train or ""), self._metrics.get(held_out or "")
        if one is None:
            return "" if other is None else f"held-out {name} {other:.3g}"
        return f"{name} {one:.3g}" + ("" if other is None else f", held-out {other:.3g}")

    def _seconds_left(self) -> float | None:
        """Of the whole run, validations included; by the batches since it began or was resumed."""
        counted = self._done - self._began_at
        if counted < 1 or self._total == 0:
            return None
        left = (time.monotonic() - self._began) / counted * max(0, self._total - self._done)
        limit = None if self._timer is None or self._stage != "train" else self._timer.time_remaining()
        return left if limit is None else min(left, max(0.0, limit))

    def _begin(self, stage: str, total: int, done: int) -> None:
        self._stage, self._total, self._done, self._began_at = stage, total, done, done
        self._told = -1
        self._phase = self._epoch = ""
        self._began = self._printed = time.monotonic()

    def _take_metrics(self, trainer: Trainer) -> None:
        self._metrics = {name: float(value) for name, value in trainer.logged_metrics.items()} | {
            name: float(value) for name, value in trainer.callback_metrics.items() if name in _METRICS
        }

    def _show(self, now: bool = False) -> None:
        """The live line changes by itself; a plain one is printed where it is time, or ``now``."""
        if not self._enabled:
            return
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, get_renderable=self._rendered, refresh_per_second=4)
                self._live.start()
        elif now or time.monotonic() - self._printed >= self.every_seconds:
            self._printed, self._told = time.monotonic(), self._done
            say(self.line())

    def _rendered(self) -> Text:
        return Text(self.line(self.console.width)[: self.console.width])

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _joined(parts: list[tuple[int, str]]) -> str:
    return " | ".join(text for _, text in parts)


def _batches_of_run(trainer: Trainer, module: LightningModule) -> int:
    """Batches until ``max_epochs`` or ``max_steps`` end the run, whichever comes first; 0 where neither does."""
    an_epoch, limits = trainer.num_training_batches, []
    if (trainer.max_epochs or 0) > 0 and an_epoch != math.inf:
        limits.append(int(an_epoch * trainer.max_epochs))  # type: ignore[operator]
    if trainer.max_steps > 0:
        if module.automatic_optimization:
            a_step = trainer.accumulate_grad_batches
            steps = math.inf if an_epoch == math.inf else math.ceil(an_epoch / a_step)
            epochs, rest = divmod(trainer.max_steps, steps) if steps < math.inf else (0, trainer.max_steps)
            limits.append(int(epochs * an_epoch if epochs else 0) + int(min(rest * a_step, an_epoch)))
        else:  # a batch is an iteration of several steps
            limits.append(math.ceil(trainer.max_steps / getattr(module, "steps_of_iteration", 1)))
    return min(limits, default=0)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
