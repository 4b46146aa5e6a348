"""From the scores of a reward to the scores that an on-policy method learns from.

Shapes: ``B`` responses of this process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_lightning.algorithms.running import RunningMoments
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import InputError


class ScoreShaping:
    """Normalises scores, takes penalties off them and bounds them, in that order.

    Args:
        normalise: subtract the mean of all scores of the training so far, this iteration's included, and divide by
            their deviation (Zheng et al. 2023, arXiv 2307.04964, "reward normalization and clipping"); penalties and
            clip are then in that unit.
        missing_eos_penalty: taken off where the response did not end by EOS.
        length_penalty: taken off for every response token past ``length_threshold``. With a threshold of ``M - c`` and
            a penalty of ``1 / c``, M being the most tokens a response can have, it is the soft overlong punishment of
            DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13).
        length_threshold: response tokens that cost nothing.
        clip: bound on the absolute value of the result; None for none.
        max_new_tokens: the most tokens a response can have.

    Raises: InputError when an option would have no effect.
    """

    def __init__(
        self,
        normalise: bool,
        missing_eos_penalty: float,
        length_penalty: float,
        length_threshold: int,
        clip: float | None,
        max_new_tokens: int,
    ) -> None:
        if length_threshold > 0 and length_penalty == 0:
            raise InputError(
                f"model.length_threshold: {length_threshold} has no effect without a penalty; set model.length_penalty "
                "(per token past it), or leave it at 0"
            )
        if length_penalty > 0 and length_threshold >= max_new_tokens:
            raise InputError(
                f"model.length_threshold: no response is longer than max_new_tokens {max_new_tokens}, so past "
                f"{length_threshold} tokens nothing is penalised; lower it"
            )
        self.missing_eos_penalty = missing_eos_penalty
        self.length_penalty, self.length_threshold = length_penalty, length_threshold
        self.clip = clip
        self.moments = RunningMoments() if normalise else None

    def observe(self, scores: Tensor, counted: Tensor) -> None:
        """Count an iteration's scores ``[B]`` (where ``counted`` is True, over all processes) into the moments."""
        if self.moments is not None:
            self.moments.update(scores, counted, all_reduce_sum)

    def __call__(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """``[B]`` scores to ``[B]`` shaped ones."""
        if self.moments is not None:
            scores = self.moments.normalise(scores)
        scores = scores - self.missing_eos_penalty * rollout.truncated.float()
        scores = scores - self.length_penalty * (rollout.response_lengths - self.length_threshold).clamp(min=0).float()
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {} if self.moments is None else {"scores": self.moments.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one made without normalisation starts the moments here."""
        if self.moments is not None and "scores" in state:
            self.moments = RunningMoments(**state["scores"])
