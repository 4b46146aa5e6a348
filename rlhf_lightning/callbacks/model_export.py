"""Writes the trained model as a folder that others can load, with a card that describes it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.callbacks.card import Card
from rlhf_lightning.callbacks.run_files import run_folder
from rlhf_lightning.collectives import failing_together
from rlhf_lightning.modules.base import RLHFModule


class ModelExport(Callback):
    """Writes ``<run>/model`` (weights, config, tokenizer, card) at the end of a fit, for transformers and later stages.

    Args:
        name: the folder's name within the run.
    """

    def __init__(self, name: str = "model") -> None:
        self.name = name
        self._card: Card | None = None  # only on the process that writes

    def on_fit_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Tries the export before the training, so that a model that cannot be saved is not found only at the end.

        Raises:
            InputError: see `models.export.try_export`; on all processes.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = run_folder(trainer) / self.name
        with failing_together():
            if trainer.is_global_zero:
                for told in pl_module.try_export(folder):
                    rank_zero_warn(f"{pl_module.model_folder}: {told}")
                self._card = Card(trainer, pl_module)
                self._card.text(self._title(folder), trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Exports the model. Every process takes part, since sharded weights must be gathered."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = run_folder(trainer) / self.name
            card = None if self._card is None else self._card.text(self._title(folder), trainer)
            pl_module.export(folder, card)
            rank_zero_info(f"model: {folder}", extra={"in_preflight": True})  # the command line prints this itself

    def _title(self, folder: Path) -> str:
        return folder.parent.name if self.name == "model" else f"{folder.parent.name} {self.name}"
