"""The frozen model that a method over pairs is held near, and its log-probs of the rows.

Shapes: ``n`` rows of this process.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import ModelFactory
from rlhf_lightning.models.policy import Policy, Reference
from rlhf_lightning.training.pairs import Rows, response_log_probs


class FrozenReference:
    """Holds the model outside the module tree: it is in no checkpoint, no optimizer and no gradient reduction.

    Args:
        folder: of the model; None takes the policy's as it is at the start.

    Attributes:
        model: the model; None before `load`.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self.model: Reference | None = None

    def load(self, factory: ModelFactory, policy: Policy, start: str) -> None:
        """Load the model; ``start`` is the folder that the policy was loaded from."""
        self.model = factory.reference(self.folder, policy, start)

    @torch.no_grad()
    def log_probs(self, rows: Rows) -> Tensor:
        """``[n]``, the responses' summed log-probs."""
        assert self.model is not None
        return response_log_probs(self.model, rows)

    def refuse_itself(self, trainer: Trainer, start: str) -> None:
        """InputError where an untrained policy would be measured against itself: every margin would be 0.

        Args:
            trainer: what validates or tests.
            start: the folder that the policy was loaded from.
        """
        if trainer.state.fn not in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            return
        folder = self.folder or start
        same = Path(folder).expanduser().resolve() == Path(start).expanduser().resolve()
        if same and trainer.ckpt_path is None and trainer.global_step == 0:
            raise InputError(
                f"model.reference: {folder} is the model that is measured too, and against itself all rewards and "
                "margins are 0: give the trained model's folder as model.model and the one that it started from as "
                "model.reference, or a checkpoint by --ckpt_path"
            )
