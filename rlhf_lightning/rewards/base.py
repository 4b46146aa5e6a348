"""The interface of rewards, and the checks of their scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError

_LARGEST = 1e15  # of a score: its square, summed over a batch, is still a float32


class Reward(nn.Module):
    """Scores responses. Subclass it and write ``forward``; name the subclass in YAML by its ``class_path``."""

    # Whether the score NaN is allowed. It means that a response has no score, and counts in no update and no mean.
    may_skip: bool = False
    # Other values of the last `forward`, each ``[B]``; logged as ``reward/<name>``, the mean over responses.
    noted: dict[str, Tensor]
    # Today's date for chat templates, as YYYY-MM-DD; set before each scoring. None for the real date.
    date: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.noted = {}

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, mesh: Any | None = None) -> None:
        """Loads models, once. Called before the first score, and again for a policy with another tokenizer.

        Args:
            tokenizer: the policy's tokenizer.
            device: the device of the rollouts.
            mesh: the device mesh to shard a model over; None without sharding.
        """

    def forward(self, rollout: Rollout) -> Tensor:
        """One score for each response: ``[B]`` float32, higher is better."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(rollout) -> Tensor [B]")


def as_scores(scores: Any, rows: int, device: torch.device) -> Tensor:
    """The scores as a detached float32 tensor ``[rows]`` on the device; they may be NaN or infinite.

    Args:
        scores: a tensor, a numpy array, or a sequence of bool, int or float.
        rows: the expected number of scores.
        device: the device of the result.

    Raises: ValueError if the scores are no numbers, or if there are not ``rows`` of them; it says what to return. A
    single number for many responses is refused, too, since it would silently broadcast.
    """
    try:
        # The dtype is given here, because a default of bf16 would round the numbers of a list.
        values = torch.as_tensor(scores, dtype=torch.float32).detach().to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected {rows} numbers, got {type(scores).__name__} ({error}); return one float a response"
        ) from error
    if values.shape != (rows,):
        raise ValueError(
            f"expected one score for each of {rows} responses, got shape {tuple(values.shape)}; "
            "return a list or a 1-D tensor with one number a response, in their order"
        )
    return values


def check_scores(scores: Any, rollout: Rollout, source: str, may_skip: bool = False) -> Tensor:
    """The scores as a detached float32 tensor ``[B]`` on the rollout's device.

    Args:
        scores: see `as_scores`.
        rollout: the responses that were scored.
        source: the reward's name, for the message.
        may_skip: allow NaN, which means that a response has no score.

    Raises: InputError if the scores are no numbers, not one for each response, not finite or too large. It names the
    source, the response and its prompt.
    """
    try:
        values = as_scores(scores, len(rollout), rollout.tokens.device)
    except ValueError as error:
        raise InputError(f"reward {source}: {error}") from error
    wrong = values.abs() > _LARGEST
    if not may_skip:
        wrong |= torch.isnan(values)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise InputError(
            f"reward {source}: the score of response {row} is {values[row].item()}; return a finite number, "
            f"at most {_LARGEST:g} from 0 ({quoted(rollout, row)})"
        )
    return values


def quoted(rollout: Rollout, row: int) -> str:
    """A row in one line for error messages: its number in the data, its prompt and its response."""
    number = int(rollout.prompts.rows[row])
    return f"row {number}: prompt {rollout.prompts.prompts[row][:80]!r}, response {rollout.responses[row][:80]!r}"
