"""The frozen model that a method over pairs is held near, and its log-probs of the rows.

Shapes: ``n`` rows of this process.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        """Loads the model; ``start`` is the folder that the policy was loaded from."""
        self.model = factory.reference(self.folder, policy, start)

    @torch.no_grad()
    def log_probs(self, rows: Rows) -> Tensor:
        """``[n]``, the responses' summed log-probs."""
        assert self.model is not None
        return response_log_probs(self.model, rows)
