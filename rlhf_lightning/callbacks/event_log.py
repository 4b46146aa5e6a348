"""TensorBoard's events of a run, and the page that it opens on."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

# The page *Custom Scalars*: what a newcomer looks at first, training and held-out data in one chart.
_CHARTS = {
    "reward": ["objective/scores", "val/scores", "train/accuracy", "val/accuracy"],
    "KL to the reference, nats a response": ["objective/kl", "val/kl"],
    "length, tokens a response": ["rollout/length", "val/length", "train/response_length", "val/response_length"],
    "losses": ["train/loss", "val/loss", "policy/loss", "critic/loss"],
}
# TensorBoard takes a name for the beginning of a regular expression.
LAYOUT = {
    "The run at a glance": {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in _CHARTS.items()}
}


class EventLogger(TensorBoardLogger):
    """TensorBoard's event file, and no hparams.yaml beside it: config.yaml has everything."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._laid_out = False

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As TensorBoardLogger's; the page of charts is laid out with the first ones."""
        if not self._laid_out:
            self._laid_out = True
            self.experiment.add_custom_scalars(LAYOUT)
        super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what is pending."""
        self.experiment.flush()
