"""Shows the progress of a run: one live line in a terminal, or plain lines from time to time elsewhere."""

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

# The metrics on the line, the most important first: the name to show, the training metric, the held-out metric.
_SHOWN = (
    ("loss", "train/loss", "val/loss"),
    ("score", "objective/scores", "val/scores"),
    ("kl", "objective/kl", None),
    ("accuracy", None, "val/accuracy"),
)
_METRICS = {metric for _, *metrics in _SHOWN for metric in metrics}


class RunProgress(ProgressBar):
    """Shows progress, phase (rollout, score, update ...), the main metrics, tokens per second and the time left.

    In a terminal it is one line that changes in place and leaves out what does not fit. Elsewhere (a log file, CI) a
    line without control codes is printed after the first batch, after every validation, at the end, and at times in
    between.

    Args:
        every_seconds: seconds between two plain lines.
    """

    def __init__(self, every_seconds: PositiveFloat = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.console = Console()
        self._live: Live | None = None
        self._enabled = True
        self._stage = ""
        self._phase = ""
        self._done = self._total = 0  # batches of the whole run, or of a validation that runs alone
        self._began_at = 0  # batches done when this process began to measure time
        self._began = self._printed = time.monotonic()
        self._told = -1  # batches done when the last plain line was printed
        self._epoch = ""
        self._metrics: dict[str, float] = {}
        self._timer: Timer | None = None  # of trainer.max_time

    # The interface of a progress bar for Trainer

    def enable(self) -> None:
        """Turns the display on."""
        self._enabled = True

    def disable(self) -> None:
        """Turns the display off (on processes other than the first)."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count batches and time."""
        self._timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)  # type: ignore[attr-defined]
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._begin("train", _batches_of_run(trainer, pl_module), done)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Counts one batch."""
        self._stage, self._phase = "train", ""
        self._done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epochs = trainer.max_epochs or 0
        self._epoch = "" if epochs == 1 else f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        self._take_metrics(trainer)
        self._show(now=self._done == self._began_at + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last line, without a phase. A plain line is there already if the run ends in a validation."""
        self._phase = ""
        if self._told != self._done:
            self._show(now=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count if validation runs alone. Within a fit it is only a phase."""
        if trainer.state.fn == "validate":
            self._begin("validate", int(sum(trainer.num_val_batches)), 0)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Counts one validation batch."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "validate":
            self._done = batch_idx + 1
            self._show()
        else:
            self.on_phase(trainer, pl_module, "validation", batch_idx + 1, int(sum(trainer.num_val_batches)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the phase, and shows the new metrics."""
        self._phase = ""
        self._take_metrics(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(now=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count batches and time."""
        self._begin("predict", int(sum(trainer.num_predict_batches)), 0)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Counts one batch."""
        self._phase = ""
        self._done = batch_idx + 1
        self._show(now=self._done == self._total)

    def on_phase(self, trainer: Trainer, module: LightningModule, phase: str, done: int, total: int) -> None:
        """Called by modules with the progress of a part of their step."""
        if getattr(trainer, "sanity_checking", False):
            return
        if phase == "rollout" and module is not None and module.automatic_optimization:
            # The module does not learn from rollouts. They are samples to show after a validation, or answers.
            phase = "samples" if trainer.state.fn == "fit" else "tokens"
        self._phase = f"{phase} {done}/{total}" if done < total else ""
        self._show()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the live line."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the live line."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints lines above the live one (for `LightningModule.print`)."""
        self.console.print(*args, markup=False, highlight=False)

    # The line

    def line(self, width: int | None = None) -> str:
        """The line as plain text. If it is longer than ``width`` characters, the least important parts are left out."""
        count = f"{self._stage} {self._done}" + (f"/{self._total}" if self._total else "")
        rate = next((v for name, v in self._metrics.items() if name.endswith("tokens_per_second")), None)
        left = self._seconds_left()
        measured = [text for shown in _SHOWN if (text := self._measured(*shown))]
        # The parts in the order of the line. Parts with the highest numbers are left out first.
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
        """Seconds until the run ends, validations included, estimated from the batches since its start or resume."""
        batches = self._done - self._began_at
        if batches < 1 or self._total == 0:
            return None
        left = (time.monotonic() - self._began) / batches * max(0, self._total - self._done)
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
        """Starts the live line, which updates itself; or prints a plain line if it is time for one, or ``now``."""
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
    """Batches until ``max_epochs`` or ``max_steps`` ends the run, whichever comes first; 0 if neither does."""
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
