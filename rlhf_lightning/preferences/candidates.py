"""Samples candidates for annotation, several answers to each prompt, and writes their rankings as rows of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.models.policy import Policy
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
    base_seed = int(uniform(seed, CANDIDATES) * 2**52)
    answers: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    engine = fitting_engine(policy)
    for number in range(count):
        sampling = Sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, eos_ids=eos_ids, seed=base_seed, iteration=number
        )
        for place, batch in enumerate(prompts):
            rollout = engine.rollout(policy, batch, tokenizer, sampling)
            for row, prompt, response in zip(batch.rows.tolist(), batch.prompts, rollout.responses, strict=True):
                texts[row] = prompt
                answers.setdefault(row, []).append(response)
            if progress is not None:
                progress(number * len(prompts) + place + 1, count * len(prompts))
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
                "completions": [_readable(text) for text in r.candidates.completions],
                "ranks": list(r.ranks),
            }
            for r in rankings
        ),
    )


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file, one row on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _readable(text: str) -> str:
    """The text without NUL characters, which a weak model may sample and rows may not hold."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
