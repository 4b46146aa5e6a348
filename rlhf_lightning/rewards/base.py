"""The interface of a reward, and the check that every reward's scores go through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError


class Reward(nn.Module):
    """Scores responses. Subclass it and write ``forward``; name the subclass in YAML by its ``class_path``."""

    # Whether NaN is a score: "none for this response", which then counts in no update and no mean.
    may_skip: bool = False
    # What `forward` noted beside its scores, each ``[B]``: logged as ``reward/<name>``, a mean over responses.
    noted: dict[str, Tensor]
    # The day that the run's chat templates say it is, as YYYY-MM-DD, set before each scoring; None for today.
    date: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.noted = {}

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, mesh: Any | None = None) -> None:
        """Called before the first score, and again for a policy with another tokenizer: load models here, once.

        Args:
            tokenizer: the policy's.
            device: where the rollouts will be.
            mesh: the device mesh to shard a model over, None without sharding.
        """

    def forward(self, rollout: Rollout) -> Tensor:
        """One score a response: ``[B]`` float32, higher is better."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(rollout) -> Tensor [B]")


def as_scores(scores: Any, rows: int, device: torch.device) -> Tensor:
    """The scores as a detached float32 tensor ``[rows]`` on the device; they may be NaN or infinite.

    Args:
        scores: a tensor, a numpy array, or a sequence of bool, int or float.
        rows: how many there should be.
        device: where the result goes.

    Raises: ValueError when they are no numbers or not ``rows``, with what to return instead. A single number for many
    responses is refused too: it would broadcast without a word.
    """
    try:
        # The dtype first: a default of bf16 would round the numbers of a list.
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
        rollout: what was scored.
        source: who gave the scores, for the message.
        may_skip: let NaN through, where it says that a response has no score.

    Raises: InputError when they are no numbers, not one a response, or not finite, naming the source, the response and
    its prompt.
    """
    try:
        values = as_scores(scores, len(rollout), rollout.tokens.device)
    except ValueError as error:
        raise InputError(f"reward {source}: {error}") from error
    wrong = torch.isinf(values) if may_skip else ~torch.isfinite(values)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise InputError(
            f"reward {source}: the score of response {row} is {values[row].item()}; return a finite number "
            f"({quoted(rollout, row)})"
        )
    return values


def quoted(rollout: Rollout, row: int) -> str:
    """The row as an error message shows it: its number in the data, its prompt and its response, in one line."""
    number = int(rollout.prompts.rows[row])
    return f"row {number}: prompt {rollout.prompts.prompts[row][:80]!r}, response {rollout.responses[row][:80]!r}"
