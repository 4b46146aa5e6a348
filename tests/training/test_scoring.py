"""A user's reward cannot harm the training: what it changes in the process is put back, and its numbers are bounded."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ppo_harness import prompts

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.training.scoring import checked_scores


def rollout() -> Rollout:
    batch = prompts(rows=2)
    return Rollout(
        prompts=batch,
        tokens=torch.cat([batch.tokens, torch.full((2, 1), 4)], dim=1),
        lengths=batch.lengths + 1,
        prompt_lengths=batch.lengths,
        log_probs=torch.zeros(2, 1),
        truncated=torch.zeros(2, dtype=torch.bool),
        responses=["one", "two"],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_reward_changes_is_put_back(fails: bool, tmp_path: Path) -> None:
    def score(rollout: Rollout) -> torch.Tensor:
        os.chdir(tmp_path)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if fails:
            raise InputError("no")
        return torch.ones(2)

    before = os.getcwd(), signal.getsignal(signal.SIGTERM)
    try:
        checked_scores(score, rollout(), None, "mine")
    except InputError:
        assert fails
    assert (os.getcwd(), signal.getsignal(signal.SIGTERM)) == before
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("value", [1e30, -1e16, float("inf"), float("nan")])
def test_a_score_too_large_for_its_square_is_one_line(value: float) -> None:
    with pytest.raises(
        InputError, match=r"reward mine: the score of response 1 is .*; return a finite number, at most"
    ):
        checked_scores(lambda rollout: torch.tensor([1e15, value]), rollout(), None, "mine")
