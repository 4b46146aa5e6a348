"""Orders items for annotation by how much reward models disagree about them: the most uncertain first.

Shapes: ``M`` reward models, ``N`` items, ``K`` answers to each at most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, micro_batches
from rlhf_lightning.data.collate import collate
from rlhf_lightning.data.records import parse_row
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import check_length, check_vocabularies, load_scalar_model, load_tokenizer
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.scalar import ScalarModel


class Item(Protocol):
    """A prompt with the answers that are to be compared."""

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """A text, or chat messages."""

    @property
    def completions(self) -> tuple[str, ...]:
        """The answers."""


def disagreement(scores: Tensor) -> Tensor:
    """How much the models disagree about each item's pairs: ``[M, N, K]`` -> ``[N]`` float64, from 0 to 0.5.

    A model's probability that answer i is preferred to answer j is ``sigmoid(r_i - r_j)`` (Bradley and Terry 1952). A
    pair's disagreement is the standard deviation of this probability over the models (correction 0). Christiano et al.
    2017, "Deep Reinforcement Learning from Human Preferences", section 2.2.4, ask people about the pairs whose
    predictions vary most over an ensemble. An item's disagreement is the mean over its pairs.

    Args:
        scores: raw scores, whose differences are log-odds. NaN where an item has no such answer, for all models alike.

    Returns: NaN for an item with fewer than two answers.
    """
    scores = scores.double()
    first, second = torch.triu_indices(scores.shape[2], scores.shape[2], offset=1)
    chances = torch.sigmoid(scores[:, :, first] - scores[:, :, second])
    return chances.std(dim=0, correction=0).nanmean(dim=1)


def by_disagreement(scores: Tensor) -> list[int]:
    """The items' numbers, by falling `disagreement` of ``[M, N, K]`` scores.

    Of equal items the earlier one comes first. Items with fewer than two answers come last.
    """
    return torch.argsort(disagreement(scores).nan_to_num(-math.inf), descending=True, stable=True).tolist()


def uncertain_order(items: Sequence[Item], folders: Sequence[str | Path]) -> list[int]:
    """The items' numbers, the ones about which the reward models disagree most first, see `by_disagreement`.

    Args:
        items: prompts with answers.
        folders: reward model folders, two or more.

    Raises:
        InputError: see `reward_scores`; or one folder is given, or one twice, which cannot disagree.
    """
    places = [Path(folder).expanduser().resolve() for folder in folders]
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise InputError(
            f"--reward {' '.join(map(str, folders))}: expected two or more different reward models, for example of "
            "several seeds: their disagreement is the order"
        )
    return by_disagreement(torch.stack([reward_scores(items, folder) for folder in folders]))


@torch.no_grad()
def reward_scores(items: Sequence[Item], folder: str | Path, batch_tokens: int = 16384) -> Tensor:
    """The raw scores of all answers by one reward model: ``[N, K]`` float32; NaN where an item has no such answer.

    Differences of raw scores are log-odds, whatever normalisation the folder has. The texts are encoded as in the
    reward model's training. Empty answers have no score, since training drops them. The work is on the GPU if there is
    one.

    Raises:
        InputError: the folder has no trained reward model, a chat prompt meets a tokenizer without a chat template, or
            a text has more tokens than the model has positions.
    """
    tokenizer = load_tokenizer(folder)
    model = load_scalar_model(folder, fresh_head=False)
    check_vocabularies(tokenizer, model, folder)
    scalar = ScalarModel(model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    scores = torch.full((len(items), max((len(item.completions) for item in items), default=0)), math.nan)
    dropped: Counter[str] = Counter()
    rows, places = [], []
    for number, item in enumerate(items):
        for place, text in enumerate(item.completions):
            values = {"prompt": item.prompt, "completion": text}
            record = parse_row(values, f"item {number}, answer {place}", dropped)
            if record is not None:
                rows.append(record)
                places.append((number, place))
    if not rows:
        return scores
    encoder = Encoder(tokenizer, train_on="last_assistant")  # a reward model is trained on whole conversations
    examples, _ = encoder.encode(rows, "demonstrations")
    lengths = torch.tensor([example.widths[0] for example in examples])
    check_length(model, int(lengths.max()), folder, "generate's --max_new_tokens")
    for group in micro_batches(lengths, batch_tokens):
        batch = collate([examples[place] for place in group.tolist()], "demonstrations", encoder.pad_id)
        assert isinstance(batch, DemonstrationBatch)
        batch = batch.to(next(scalar.parameters()).device)
        found = at_last_token(scalar(batch.tokens, batch.lengths, normalise=False), batch.lengths)
        at = torch.tensor([places[place] for place in group.tolist()])
        scores[at[:, 0], at[:, 1]] = found.float().cpu()
    return scores
