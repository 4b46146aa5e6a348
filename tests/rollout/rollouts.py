"""Rollouts of tiny models, and the oracle that they are compared with: the whole sequence anew for each token."""

from __future__ import annotations

from typing import Any

import torch
from architectures import build
from ppo_harness import prompts
from tiny_models import make_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import NativeEngine, RolloutEngine, Sampling

EOS = 1
TOKENIZER = make_tokenizer("<pad>")


def sample(policy: Policy, batch: PromptBatch, engine: RolloutEngine | None = None, **options: Any) -> Rollout:
    """A rollout of up to 12 tokens by the native engine, unless the options say otherwise."""
    values: dict[str, Any] = {"max_new_tokens": 12, "eos_ids": [EOS], "seed": 0, "iteration": 0}
    return (engine or NativeEngine()).rollout(policy, batch, TOKENIZER, Sampling(**{**values, **options}))


def small_prompts(rows: int = 6, padding: int = 0) -> PromptBatch:
    """Prompts of 2 to 5 tokens for the models of `architectures`, whose vocabulary is 40 tokens."""
    batch = prompts(rows, padding=padding)
    batch.tokens %= 40
    return batch


def no_prompts() -> PromptBatch:
    """A batch without rows."""
    batch = small_prompts(1)
    return PromptBatch(batch.tokens[:0], batch.lengths[:0], batch.rows[:0], batch.weights[:0], [], {})


def small_policy(name: str, **options: Any) -> Policy:
    """A float64 policy of `architectures`."""
    return Policy(build(name, **options)).eval()


@torch.no_grad()
def continued(model: PreTrainedModel, prompt: Tensor, count: int) -> list[int]:
    """The ``count`` most probable tokens after a prompt ``[P]``, each from a pass over all that precedes it."""
    tokens = prompt[None]
    for _ in range(count):
        logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
        tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
    return tokens[0, len(prompt) :].tolist()
