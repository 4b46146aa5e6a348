"""A PPO module on a tiny model, prompts to train it on, and a record of what an iteration saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from making import make, merged
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf_lightning.batches import PromptBatch, Rollout, length_mask
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rewards import Reward

WORDS = 60  # ids 4 .. 63 are words


class TokenReward(Reward):
    """How many of a response's tokens have an even id: a score that differs between responses and can be learnt."""

    def forward(self, rollout: Rollout) -> Tensor:
        even = (rollout.tokens % 2 == 0) & length_mask(rollout.lengths, rollout.tokens.shape[1])
        return even.float().sum(dim=1)


class LastTokenReward(Reward):
    """1 where a response's last token has an even id: many responses score the same."""

    def forward(self, rollout: Rollout) -> Tensor:
        return (rollout.tokens.gather(1, rollout.lengths[:, None] - 1)[:, 0] % 2 == 0).float()


class Recording:
    """Keeps what each iteration sampled, scored and learnt from; stands before the module's class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts: list[Rollout] = []
        self.experiences: list[Any] = []
        self.logged: list[dict[str, float]] = []
        self.stepped_rows: list[Tensor] = []

    def sample(self, batch: PromptBatch) -> tuple[Rollout, Tensor]:
        rollout, scores = super().sample(batch)
        self.rollouts.append(rollout)
        return rollout, scores

    def learn(self, experience: Any) -> int:
        self.experiences.append(experience)
        return super().learn(experience)

    def update(self, experience: Any, rows: Tensor, counts: Tensor) -> bool:
        self.stepped_rows.append(rows)
        return super().update(experience, rows, counts)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.append({name: float(value) for name, value in dictionary.items()})
        super().log_dict(dictionary, *args, **kwargs)


class Recorder(Recording, PPOModule):
    """PPO with a record."""


def make_module(
    policy: Path | str, reward: Reward | None = None, method: type[OnPolicyModule] = PPOModule, **options: Any
) -> Any:
    """A recorder of 1 iteration, 1 epoch, 1 minibatch and short responses, unless the options say otherwise."""
    values: dict[str, Any] = {
        "iterations": 1,
        "sampling": {"max_new_tokens": 6},
        "update": {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 64},
        "optimizer": {"learning_rate": 1e-3},
    }
    cls = Recorder if method is PPOModule else type(f"Recorded{method.__name__}", (Recording, method), {})
    return make(cls, str(policy), reward if reward is not None else TokenReward(), **merged(values, options))


def prompts(rows: int = 8, start: int = 0, padding: int = 0) -> PromptBatch:
    """Rows of 2 to 5 words, a function of their numbers alone; ``padding`` columns more than they need."""
    numbers = torch.arange(start, start + rows)
    lengths = 2 + numbers % 4
    places = torch.arange(int(lengths.max()) + padding)
    tokens = 4 + (numbers[:, None] * 7 + places[None, :] * 13) % WORDS
    tokens = torch.where(places[None, :] < lengths[:, None], tokens, 0)
    return PromptBatch(
        tokens=tokens,
        lengths=lengths,
        rows=numbers,
        weights=torch.ones(rows),
        prompts=[f"prompt {number}" for number in numbers.tolist()],
        columns={},
    )


def fit(
    module: OnPolicyModule,
    batches: list[PromptBatch] | None = None,
    ckpt_path: str | None = None,
    **trainer: Any,
) -> Trainer:
    """Run the module's iterations on the CPU over the batches (8 new rows each by default)."""
    if batches is None:
        batches = [prompts(start=8 * number) for number in range(module.iterations)]
    loader = DataLoader(batches, batch_size=None)
    options: dict[str, Any] = {"max_epochs": 1, "logger": DummyLogger(), "enable_checkpointing": False}
    run = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{**options, **trainer},
    )
    run.fit(module, loader, ckpt_path=ckpt_path)
    return run
