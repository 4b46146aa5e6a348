"""What is trained: the sizes, random batches, and the real modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, PromptBatch, Rollout
from rlhf_lightning.modules import DPOModule, PPOModule, SFTModule
from rlhf_lightning.rewards import Reward


@dataclass(frozen=True)
class Size:
    """A model, and the batches that it is trained on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    precision: str
    prompt: tuple[int, int]  # tokens, from and to
    response: tuple[int, int]  # the same; PPO samples as many as its longest
    rows: dict[str, int]  # of a batch, by task
    ppo: dict[str, Any]  # options


SIZES = {
    "16m": Size(
        **{"hidden": 256, "intermediate": 688, "layers": 4, "heads": 4, "kv_heads": 4, "vocabulary": 49152},
        **{"precision": "32-true", "prompt": (8, 32), "response": (16, 48)},
        rows={"ppo": 16, "sft": 16, "dpo": 16},
        ppo={"epochs": 1, "minibatches": 4},
    ),
    # The model, batches and lengths of the demo (configs/demo/).
    "demo": Size(
        **{"hidden": 192, "intermediate": 512, "layers": 2, "heads": 4, "kv_heads": 4, "vocabulary": 768},
        **{"precision": "32-true", "prompt": (17, 21), "response": (20, 48)},
        rows={"ppo": 128, "sft": 32, "dpo": 32},
        ppo={"epochs": 2, "minibatches": 2},
    ),
    # SmolLM2-135M's shape, as configs/smollm2/ train it.
    "smollm2": Size(
        **{"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocabulary": 49152},
        **{"precision": "bf16-mixed", "prompt": (40, 80), "response": (16, 48)},
        rows={"ppo": 8, "sft": 16, "dpo": 16},
        ppo={"epochs": 1, "minibatches": 2, "critic": 4, "micro_batch_tokens": 2048},
    ),
}


class EvenTokens(Reward):
    """The share of tokens with an even id: costs nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return (rollout.tokens % 2 == 0).float().mean(dim=1)


class RandomBatches(LightningDataModule):
    """``count`` batches of random tokens and lengths, fresh in every step."""

    def __init__(self, folder: Path, task: str, size: Size, count: int) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.task, self.size = task, size
        self.draw = torch.Generator().manual_seed(1)
        self.batches = [self._batch(number) for number in range(count)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def _lengths(self, bounds: tuple[int, int]) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, (self.size.rows[self.task],), generator=self.draw)

    def _tokens(self, lengths: Tensor) -> Tensor:
        shape = (len(lengths), int(lengths.max()))
        return torch.randint(4, self.size.vocabulary, shape, generator=self.draw)

    def _batch(self, number: int) -> Any:
        prompts, rows = self._lengths(self.size.prompt), self.size.rows[self.task]
        weights = torch.ones(rows)
        if self.task == "ppo":
            numbers = number * rows + torch.arange(rows)
            return PromptBatch(self._tokens(prompts), prompts, numbers, weights, [""] * rows, {})
        sides = []
        for _ in range(1 if self.task == "sft" else 2):
            lengths = prompts + self._lengths(self.size.response)
            sides.append(DemonstrationBatch(self._tokens(lengths), lengths, prompts, weights))
        return sides[0] if self.task == "sft" else PreferenceBatch(*sides, torch.zeros(rows), weights)


def make_module(task: str, size: Size, folder: Path, steps: int) -> Any:
    if task == "sft":
        return SFTModule(str(folder))
    if task == "dpo":
        return DPOModule(str(folder))
    return PPOModule(str(folder), EvenTokens(), iterations=steps, max_new_tokens=size.response[1], **size.ppo)
