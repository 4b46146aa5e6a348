"""How a module uses its reward: it prepares the reward's models, checks scores, and drops unscored responses.

Shapes: ``B`` responses of this process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout
from rlhf_lightning.collectives import failing_together
from rlhf_lightning.models.building import Place
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.rewards.base import Reward, check_scores
from rlhf_lightning.training.totals import Totals


def parts_of(reward: Reward | None) -> Iterator[Reward]:
    """A reward and all that it is made of."""
    return (part for part in (reward.modules() if reward is not None else ()) if isinstance(part, Reward))


def prepare_reward(reward: Reward | None, tokenizer: PreTrainedTokenizerBase, place: Place) -> None:
    """Loads what the reward needs. A `ModelReward`'s model gets the run's precision; a user's reward keeps its own."""
    if reward is None:
        return
    reward.prepare(tokenizer, place.device, place.mesh)
    for part in reward.modules():
        if isinstance(part, ScalarModel):  # of a `ModelReward`
            place.convert(part)


def checked_scores(
    score: Callable[[Rollout], Tensor], rollout: Rollout, reward: Reward | None, source: str, date: str | None = None
) -> Tensor:
    """The scores ``[B]`` of a rollout, finite, or NaN for none where the reward may skip.

    Args:
        score: gives them.
        rollout: the responses.
        reward: what ``score`` asks.
        source: where they are from, for messages.
        date: the day that the run's chat templates say it is.

    Raises:
        InputError: the scores of a process are wrong; on all processes.
    """
    if date is not None:
        for part in parts_of(reward):
            part.date = date
    with failing_together(), unharmed():
        return check_scores(score(rollout), rollout, source, reward is not None and reward.may_skip)


@contextmanager
def unharmed() -> Iterator[None]:
    """Restores what a user's code may change for the whole process, so that it does not change the training.

    That is the working directory, torch's grad mode and default dtype, and the handlers of signals.
    """
    folder = None
    with suppress(OSError):  # it may have been removed
        folder = os.getcwd()
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set a handler
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()} if main else {}
    try:
        yield
    finally:
        if folder is not None:
            os.chdir(folder)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def settle(
    rollout: Rollout, scores: Tensor, reward: Reward | None, totals: Totals, group_size: int = 1
) -> tuple[Rollout, Tensor]:
    """The rollout and its scores ``[B]``, unscored responses taken out; the reward's notes are added to ``totals``.

    A reward may skip a response. That response then gets score 0 and weight 0, and so do the others to the same prompt,
    because a group is compared as a whole. ``reward/skipped`` counts them.
    """
    if reward is not None and reward.may_skip:
        weights = rollout.prompts.weights
        missing = torch.isnan(scores).reshape(-1, group_size).any(dim=1).repeat_interleave(group_size)
        totals.add("reward/skipped", missing, weights > 0)
        rollout = replace(rollout, prompts=replace(rollout.prompts, weights=weights.masked_fill(missing, 0.0)))
        scores = scores.masked_fill(missing, 0.0)
    for part in parts_of(reward):
        for name, values in part.noted.items():
            totals.add(f"reward/{name}", values, rollout.prompts.weights > 0)
    return rollout, scores
