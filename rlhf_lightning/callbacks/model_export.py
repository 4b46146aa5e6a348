"""The trained model as a folder that others can load, with a card that says what it is."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.callbacks.card import Card
from rlhf_lightning.callbacks.run_files import run_folder
from rlhf_lightning.collectives import failing_together
from rlhf_lightning.modules.base import RLHFModule


class ModelExport(Callback):
    """At the end of a fit writes ``<run>/model``, for transformers and later stages: weights, config, tokenizer, card.

    Args:
        name: the folder's name within the run.
    """

    def __init__(self, name: str = "model") -> None:
        self.name = name
        self._card: Card | None = None  # on the process that writes

    def on_fit_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Try it, so that what cannot be saved or written is known before the training and not after.

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
        """Every process takes part: sharded weights are gathered."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = run_folder(trainer) / self.name
            card = None if self._card is None else self._card.text(self._title(folder), trainer)
            pl_module.export(folder, card)
            rank_zero_info(f"model: {folder}", extra={"in_preflight": True})  # the command line says it by itself

    def _title(self, folder: Path) -> str:
        return folder.parent.name if self.name == "model" else f"{folder.parent.name} {self.name}"
