"""Logs a run to TensorBoard, with a page of the most important charts."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

# The charts of the page *Custom Scalars*, for a first look: training and held-out data together.
_CHARTS = {
    "reward": ["objective/scores", "val/scores", "train/accuracy", "val/accuracy"],
    "KL to the reference, nats a response": ["objective/kl", "val/kl"],
    "length, tokens a response": ["rollout/length", "val/length", "train/response_length", "val/response_length"],
    "losses": ["train/loss", "val/loss", "policy/loss", "critic/loss"],
}
# TensorBoard treats each name as a regular expression for the beginning of a tag.
LAYOUT = {
    "The run at a glance": {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in _CHARTS.items()}
}


class EventLogger(TensorBoardLogger):
    """Writes TensorBoard's event file, without hparams.yaml, since config.yaml has all options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._laid_out = False

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs the metrics; with the first ones it also writes the layout of the page of charts."""
        if not self._laid_out:
            self._laid_out = True
            self.experiment.add_custom_scalars(LAYOUT)
        super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        """Writes pending events to the file."""
        self.experiment.flush()
