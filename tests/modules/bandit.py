"""A problem small enough to enumerate: every response of at most two tokens to one prompt."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import make_config, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.rewards import Reward

EOS, VOCABULARY, BETA = 1, 8, 0.5
PROMPT = [4, 5]


@dataclass
class Bandit:
    """Every response of at most two tokens to one prompt, with its probability and its reward."""

    responses: list[list[int]]
    rewards: Tensor  # [number of responses] float64

    @classmethod
    def make(cls) -> Bandit:
        long = [[a, b] for a, b in itertools.product(range(VOCABULARY), repeat=2) if a != EOS]
        responses = [[EOS], *long]
        # Ending at once is worth 0; otherwise the tokens' worth: 1.5 for a 6 first, 1 for an EOS after it.
        rewards = [0.0] + [1.5 * (a == 6) + 1.0 * (b == EOS) - 0.5 * (b == a) for a, b in long]
        return cls(responses, torch.tensor(rewards, dtype=torch.float64))

    @torch.no_grad()
    def log_probs(self, model: LlamaForCausalLM) -> Tensor:
        """Log-probability of each response as a whole, float64, by the stock model."""
        totals = torch.full((len(self.responses),), torch.nan, dtype=torch.float64)
        for length in (1, 2):  # rows without padding
            rows = [row for row, response in enumerate(self.responses) if len(response) == length]
            responses = torch.tensor([self.responses[row] for row in rows])
            tokens = torch.cat([torch.tensor([PROMPT] * len(rows)), responses], 1)
            table = model(tokens).logits[:, len(PROMPT) - 1 : -1].double().log_softmax(-1)
            totals[rows] = table.gather(-1, responses[..., None])[..., 0].sum(1)
        return totals

    def objective(self, model: LlamaForCausalLM, reference: Tensor) -> float:
        """E[reward] - beta KL(policy || reference), summed over all responses."""
        log_probs = self.log_probs(model)
        return (log_probs.exp() * (self.rewards - BETA * (log_probs - reference))).sum().item()


class BanditReward(Reward):
    def __init__(self, bandit: Bandit) -> None:
        super().__init__()
        self.worth = {
            tuple(response): reward for response, reward in zip(bandit.responses, bandit.rewards, strict=True)
        }

    def forward(self, rollout: Rollout) -> Tensor:
        rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
        return torch.stack([self.worth[tuple(tokens[start:end])] for tokens, start, end in rows]).float()


def repeated_prompt(rows: int, iteration: int) -> PromptBatch:
    return PromptBatch(
        tokens=torch.tensor([PROMPT] * rows),
        lengths=torch.full((rows,), len(PROMPT)),
        rows=torch.arange(rows),
        weights=torch.ones(rows),
        prompts=["prompt"] * rows,
        columns={},
    )


def small_tokenizer():
    tokenizer = make_tokenizer("<pad>")
    words = [
        token for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if index < VOCABULARY
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def save_small_policy(folder: Path, seed: int) -> None:
    """A tiny Llama of random weights whose tokens are those of the bandit."""
    torch.manual_seed(seed)
    LlamaForCausalLM(make_config(vocab_size=VOCABULARY, initializer_range=0.1)).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
