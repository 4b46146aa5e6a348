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


def check_scores(scores: Any, rollout: Rollout, source: str) -> Tensor:
    """The scores as a detached float32 tensor ``[B]`` on the rollout's device.

    Args:
        scores: a tensor, a numpy array, or a sequence of bool, int or float.
        rollout: what was scored.
        source: who gave the scores, for the message.

    Raises: InputError when they are no numbers, not one a response, or not finite, naming the source and the response.
    A single number for many responses is refused too: it would broadcast without a word.
    """
    rows = len(rollout)
    try:
        # The dtype first: a default of bf16 would round the numbers of a list.
        values = torch.as_tensor(scores, dtype=torch.float32).detach().to(rollout.tokens.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"reward {source}: expected {rows} numbers, got {type(scores).__name__} ({error}); return one float "
            f"a response"
        ) from error
    if values.shape != (rows,):
        raise InputError(
            f"reward {source}: expected one score for each of {rows} responses, got shape {tuple(values.shape)}; "
            "return a list or a 1-D tensor with one number a response, in their order"
        )
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).nonzero()[0, 0])
        raise InputError(
            f"reward {source}: the score of response {row} is {values[row].item()}; return a finite number "
            f"(the response was {rollout.responses[row][:80]!r})"
        )
    return values
