"""The trained model as a folder that others can load."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from rlhf_lightning.callbacks.folders import run_folder
from rlhf_lightning.modules.base import RLHFModule


class ModelExport(Callback):
    """At the end of a fit writes ``<run>/model``: weights, config and tokenizer, for transformers and the next stage.

    Args:
        name: the folder's name within the run.
    """

    def __init__(self, name: str = "model") -> None:
        self.name = name

    def on_fit_end(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Every process takes part: sharded weights are gathered."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            pl_module.export(run_folder(trainer) / self.name)
