"""Score shaping: from a reward's scores to the scores that an on-policy method learns from.

Shapes: ``B`` responses of this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_lightning.algorithms.running import RunningMoments
from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import all_reduce_sum
from rlhf_lightning.errors import InputError
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, Options, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """From the scores of a reward to the scores that are learnt from, in the order of these options.

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

    Raises:
        InputError: an option would have no effect.
    """

    normalise: bool = False
    missing_eos_penalty: NonNegativeFloat = 0.0
    length_penalty: NonNegativeFloat = 0.0
    length_threshold: NonNegativeInt = 0
    clip: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length_threshold > 0 and self.length_penalty == 0:
            raise InputError(
                f"model.scores.length_threshold: {self.length_threshold} has no effect without a penalty; set "
                "model.scores.length_penalty (per token past it), or leave it at 0"
            )


class ScoreShaping:
    """Normalises scores, takes penalties off them and bounds them.

    Args:
        options: how.
        max_new_tokens: the most tokens a response can have.

    Raises:
        InputError: the length penalty would have no effect.
    """

    def __init__(self, options: ScoreOptions, max_new_tokens: int) -> None:
        if options.length_penalty > 0 and options.length_threshold >= max_new_tokens:
            raise InputError(
                f"model.scores.length_threshold: no response is longer than max_new_tokens {max_new_tokens}, so past "
                f"{options.length_threshold} tokens nothing is penalised; lower it"
            )
        self.options = options
        self.moments = RunningMoments() if options.normalise else None

    def observe(self, scores: Tensor, counted: Tensor) -> None:
        """Counts an iteration's scores ``[B]`` (where ``counted`` is True, over all processes) into the moments."""
        if self.moments is not None:
            self.moments.update(scores, counted, all_reduce_sum)

    def __call__(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """``[B]`` scores to ``[B]`` shaped ones."""
        if self.moments is not None:
            scores = self.moments.normalise(scores)
        options = self.options
        scores = scores - options.missing_eos_penalty * rollout.truncated.float()
        over = (rollout.response_lengths - options.length_threshold).clamp(min=0)
        scores = scores - options.length_penalty * over.float()
        return scores if options.clip is None else scores.clamp(-options.clip, options.clip)

    def state(self) -> dict[str, Any]:
        """The part that a checkpoint holds."""
        return {} if self.moments is None else self.moments.state()

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; one made without normalisation starts the moments here."""
        if self.moments is not None and state:
            self.moments = RunningMoments(**state)


def check_group(size: int) -> int:
    """The size; InputError where it is below 2, which leaves nothing to compare."""
    if size < 2:
        raise InputError(f"model.group_size: expected at least 2 responses to each prompt, got {size}")
    return size
