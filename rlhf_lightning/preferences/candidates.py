"""Samples candidates for annotation, several answers to each prompt, and writes their rankings as rows of a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.outputs import write_whole
from rlhf_lightning.preferences.annotator import SimulatedAnnotator
from rlhf_lightning.randomness import CANDIDATES, uniform
from rlhf_lightning.rollout.engine import Sampling
from rlhf_lightning.rollout.fitting import fitting_engine

Quality = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (prompts, responses) -> one number a response


@dataclass(frozen=True)
class Candidates:
    """One prompt with its sampled answers."""

    row: int  # the prompt's number in its file
    prompt: str
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Ranking:
    """One prompt with its answers, their ranks, and their true quality, which only the simulation knows."""

    candidates: Candidates
    ranks: tuple[int, ...]  # 1 for the best
    quality: tuple[float, ...]

    def pairs(self) -> list[tuple[float, float]]:
        """The true qualities of every two answers that make a pair to learn from: neither is empty, and they differ."""
        texts = [text.strip() for text in self.candidates.completions]
        return [
            (self.quality[i], self.quality[j])
            for i, j in combinations(range(len(texts)), 2)
            if texts[i] and texts[j] and texts[i] != texts[j]
        ]


def candidate_seed(seed: int, policy: str = "") -> int:
    """The seed of `Sampling` for a policy's candidates: of streams that no training and no other policy's name has."""
    name = int.from_bytes(hashlib.blake2b(policy.encode(), digest_size=7).digest()) if policy else None
    return int(uniform(seed, CANDIDATES, *([] if name is None else [name])) * 2**52)


def candidate_rollouts(
    policy: Policy,
    prompts: Sequence[PromptBatch],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    sampling: Sampling,
    known: Callable[[int, PromptBatch], bool] = lambda number, batch: False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, PromptBatch, Rollout]]:
    """Yields ``count`` answers to every batch: the answers' number from 0, the batch, and one answer to each row.

    Args:
        policy, prompts, tokenizer, count: see `sample_candidates`.
        sampling: how answers are drawn; ``iteration`` becomes the answers' number.
        known: for a number and a batch, whether these answers need not be sampled and yielded.
        progress: see `RolloutEngine.generate`.
    """
    engine = fitting_engine(policy)
    device = next(policy.parameters()).device
    for number in range(count):
        for batch in prompts:
            if not known(number, batch):
                drawn = replace(sampling, iteration=number)
                yield number, batch, engine.rollout(policy, batch.to(device), tokenizer, drawn, progress)


def sample_candidates(
    policy: Policy,
    prompts: Sequence[PromptBatch],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: list[int],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidates]:
    """``count`` answers to every prompt, in the order of the prompts' row numbers.

    Args:
        policy: the model that answers.
        prompts: batches of prompts.
        count: number of answers to each prompt.
        max_new_tokens, temperature, eos_ids: sampling options, see `rollout.Sampling`.
        seed: seed of the sampling; the draws differ from those of a training run with the same seed.
        progress: called with (batches answered, batches to answer).
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, eos_ids=eos_ids, seed=candidate_seed(seed)
    )
    answers: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    for done, (_, batch, rollout) in enumerate(candidate_rollouts(policy, prompts, tokenizer, count, sampling)):
        for row, prompt, response in zip(batch.rows.tolist(), batch.prompts, rollout.responses, strict=True):
            texts[row] = prompt
            answers.setdefault(row, []).append(response)
        if progress is not None:
            progress(done + 1, count * len(prompts))
    return [Candidates(row, texts[row], tuple(answers[row])) for row in sorted(answers)]


def annotate(candidates: Sequence[Candidates], annotator: SimulatedAnnotator, quality: Quality) -> list[Ranking]:
    """Lets the annotator rank every prompt's answers. All prompts must have the same number of answers."""
    count = len(candidates[0].completions)
    prompts = [item.prompt for item in candidates for _ in range(count)]
    responses = [text for item in candidates for text in item.completions]
    values = torch.tensor(quality(prompts, responses), dtype=torch.float64).reshape(len(candidates), count)
    ranks = annotator.rank(values, torch.tensor([item.row for item in candidates]))
    return [
        Ranking(item, tuple(order), tuple(row))
        for item, order, row in zip(candidates, ranks.tolist(), values.tolist(), strict=True)
    ]


def write_rankings(rankings: Iterable[Ranking], path: Path) -> None:
    """Writes rows ``{"prompt", "completions", "ranks"}``, a form that the data options of all modules read."""
    write_rows(
        path,
        (
            {
                "prompt": r.candidates.prompt,
                "completions": [readable(text) for text in r.candidates.completions],
                "ranks": list(r.ranks),
            }
            for r in rankings
        ),
    )


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file, one row on each line. It is complete, and on the disk, as soon as it exists."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def readable(text: str) -> str:
    """The text without NUL characters, which a weak model may sample and rows may not hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
