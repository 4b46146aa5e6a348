"""The trained model as a folder that others can load."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.callbacks.folders import run_folder
from rlhf_lightning.distributed import failing_together
from rlhf_lightning.modules.base import RLHFModule


class ModelExport(Callback):
    """At the end of a fit writes ``<run>/model``: weights, config and tokenizer, for transformers and the next stage.

    Args:
        name: the folder's name within the run.
    """

    def __init__(self, name: str = "model") -> None:
        self.name = name

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
                    rank_zero_warn(f"{pl_module.model}: {told}")

    def on_fit_end(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Every process takes part: sharded weights are gathered."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            pl_module.export(run_folder(trainer) / self.name)
