"""A model with one number at every position of a sequence: a reward model, or a critic of its own.

Its head has one row, so the fused language-model head has no use here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.layers import linear_in_full_precision
from rlhf_lightning.models.packing import can_pack, hidden_states
from rlhf_lightning.models.passes import note
from rlhf_lightning.models.routers import Routers


class ScalarModel(nn.Module):
    """A Hugging Face sequence classifier of one label, read at every position.

    The score of a response is the number at its last token (``positions.at_last_token``), found by length: stock
    sequence classifiers look for the last token that differs from pad, which is one too early where pad is EOS.

    Args:
        model: the classifier, its head an ``nn.Linear`` named ``score`` (see ``loading.load_scalar_model``); kept as
            ``scalar.model``. ``reward_mean`` and ``reward_std`` of its config normalise the output; 0 and 1 if absent.

    Attributes:
        routers: see `Policy`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.packs = can_pack(self._trunk)
        self.routers: Routers | None = None

    @property
    def _trunk(self) -> PreTrainedModel:
        trunk = self.model.base_model
        assert isinstance(trunk, PreTrainedModel)
        return trunk

    def forward(self, tokens: Tensor, lengths: Tensor, normalise: bool = True) -> Tensor:
        """``(raw - mean) / std`` at every position: ``[B, S]``, ``[B]`` -> ``[B, S]`` float32 (float64 for float64).

        Args:
            tokens: int64, right-padded with any id of the vocabulary.
            lengths: int64; positions from there on are 0.
            normalise: False gives the raw scores, the ones that stock transformers gives.
        """
        note(self.model, tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        states = hidden_states(self._trunk, tokens, lengths, self.packs, self.routers)
        score = self.model.score
        assert isinstance(score, nn.Linear)
        scores = linear_in_full_precision(states, score)[..., 0]
        if normalise:
            scores = (scores - self.reward_mean) / self.reward_std
        return scores.masked_fill(places >= lengths[:, None], 0.0)

    @property
    def reward_mean(self) -> float:
        """The raw score that counts as 0."""
        return float(getattr(self.model.config, "reward_mean", 0.0))

    @property
    def reward_std(self) -> float:
        """The raw difference that counts as 1."""
        return float(getattr(self.model.config, "reward_std", 1.0))

    def set_normalisation(self, mean: float, std: float) -> None:
        """Writes mean and deviation of the raw scores to the config, from where they are saved and loaded.

        Raises:
            InputError: they are not finite, or the deviation is not positive (every score was the same).
        """
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise InputError(f"scores of mean {mean} and deviation {std} cannot be normalised: check the reward model")
        self.model.config.reward_mean = float(mean)
        self.model.config.reward_std = float(std)
