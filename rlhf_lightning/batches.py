"""The nouns of the pipeline: what the data side hands to the modules, with a shape on every field.

Shapes: ``B`` rows, ``S`` prompt + response tokens, ``P`` prompt tokens, ``T`` response tokens. Sequences are
right-padded and carry their lengths; masks are made from lengths, never from ``tokens != pad``, so a pad token that
equals EOS is right by construction. Masks are bool and True counts.

Batches are plain dataclasses with their own ``.to`` and are never mutated (Lightning rebuilds dataclass batches field
by field, which refuses frozen ones).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.errors import check_choice

ViewKind = Literal["demonstrations", "pairs", "prompts"]
Beside = Literal["none", "held_out", "all"]
_B = TypeVar("_B", bound="_Batch")


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True at the first ``lengths[b]`` of ``width`` positions: ``[B]`` int -> ``[B, width]`` bool."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def micro_batches(lengths: Tensor, budget: int) -> list[Tensor]:
    """Row numbers grouped so that a group's padded tokens, rows times its longest, stay within the budget.

    Args:
        lengths: ``[B]`` int64, tokens in each row.
        budget: padded tokens in a group at most; a single row longer than it is a group of its own.

    Returns: int64 tensors that together hold every row number once, rows of similar length together, longest first
    (what does not fit into memory then fails at once).
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    groups, start = [], 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        groups.append(order[start : start + rows])
        start += rows
    return groups


@dataclass
class _Batch:
    def to(self: _B, device: torch.device | str, **kwargs: Any) -> _B:
        """A copy with every tensor (also of nested batches) on ``device``; anything else is shared."""
        return self._map(lambda tensor: tensor.to(device, **kwargs))

    def pin_memory(self: _B) -> _B:
        """A copy with every tensor in pinned memory (called by DataLoader when ``pin_memory`` is on)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self: _B, function: Any) -> _B:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif is_dataclass(value) and isinstance(value, _Batch):
                changed[field.name] = value._map(function)
        return replace(self, **changed)


@dataclass
class DemonstrationBatch(_Batch):
    """Prompts with the responses to imitate (SFT), or one side of a preference pair."""

    tokens: Tensor  # [B, S] int64, prompt then response, right-padded
    lengths: Tensor  # [B] int64, prompt + response tokens
    prompt_lengths: Tensor  # [B] int64, prompt tokens; the response is tokens[b, prompt_lengths[b]:lengths[b]]
    weights: Tensor  # [B] float32, how much the row counts; 0 marks a filler row that evens out the ranks
    # [B, T] bool, which response tokens are the assistant's own words: False on the user's and the tools' between two
    # of its turns, and past the end. None where all of a response is.
    spoken: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def mask(self) -> Tensor:
        """[B, S] bool, True on real tokens."""
        return length_mask(self.lengths, self.tokens.shape[1])

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, True on the response tokens that are learnt from and measured."""
        if self.spoken is not None:
            return self.spoken
        steps = self.lengths - self.prompt_lengths
        return length_mask(steps, int(steps.max()))

    @property
    def response_weights(self) -> Tensor:
        """[B, T] float32, how much each response token counts: its row's weight, and 0 where it does not."""
        return self.response_mask * self.weights[:, None]

    def take(self, rows: Tensor) -> DemonstrationBatch:
        """The given rows, cut to the longest of them."""
        return DemonstrationBatch(
            tokens=self.tokens[rows, : int(self.lengths[rows].max())],
            lengths=self.lengths[rows],
            prompt_lengths=self.prompt_lengths[rows],
            weights=self.weights[rows],
            spoken=None if self.spoken is None else self.spoken[rows, : self._steps(rows)],
        )

    def _steps(self, rows: Tensor) -> int:
        return int((self.lengths - self.prompt_lengths)[rows].max())


@dataclass
class PreferenceBatch(_Batch):
    """Pairs of responses to the same prompts, the first preferred to the second."""

    chosen: DemonstrationBatch  # B rows
    rejected: DemonstrationBatch  # B rows, its own width S
    margins: Tensor  # [B] float32, by how much the chosen one is better, in reward units; 0 where not given
    weights: Tensor  # [B] float32, how much the pair counts; 0 marks a filler row

    def __len__(self) -> int:
        return self.weights.shape[0]


@dataclass
class LabelledBatch(_Batch):
    """Responses that were judged one by one, each desirable or not."""

    responses: DemonstrationBatch  # B rows
    desirable: Tensor  # [B] bool

    def __len__(self) -> int:
        return self.desirable.shape[0]

    @property
    def weights(self) -> Tensor:
        """[B] float32, how much the row counts; 0 marks a filler row."""
        return self.responses.weights


@dataclass
class PromptBatch(_Batch):
    """Prompts to answer."""

    tokens: Tensor  # [B, P] int64, right-padded
    lengths: Tensor  # [B] int64
    rows: Tensor  # [B] int64, the row's number in the whole prompt set: the same for any batching or process count
    weights: Tensor  # [B] float32; 0 marks a filler row
    prompts: list[str]  # B raw prompts as the user wrote them (chat prompts: the last user message)
    columns: dict[str, list[Any]]  # the rows' other columns, each a list of B; handed to reward functions by name
    # B rows, what people answered to the same prompts: an empty response of weight 0 where the data has none
    demonstrations: DemonstrationBatch | None = None
    # B prompts as chat templates read them: `messages` (the last perhaps the assistant's own beginning) and `tools`, a
    # list or None; None for a prompt that is plain text. None for all where nobody said.
    conversations: list[dict[str, Any] | None] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def repeat(self, times: int) -> PromptBatch:
        """Every prompt ``times`` times in a row; copy k of row r is numbered ``r * times + k``, so each draws its own.
        Demonstrations are left behind.

        ``[B]`` rows -> ``[B * times]`` rows.
        """
        if times == 1:
            return self
        copies = torch.arange(len(self), device=self.rows.device).repeat_interleave(times)
        numbers = self.rows[copies] * times + torch.arange(times, device=self.rows.device).repeat(len(self))
        return replace(self.take(copies), rows=numbers)

    def take(self, rows: Tensor) -> PromptBatch:
        """The given rows, in that order."""
        places = rows.tolist()
        return PromptBatch(
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            rows=self.rows[rows],
            weights=self.weights[rows],
            prompts=[self.prompts[place] for place in places],
            columns={name: [cells[place] for place in places] for name, cells in self.columns.items()},
            conversations=None if self.conversations is None else [self.conversations[place] for place in places],
        )


@dataclass
class Rollout(_Batch):
    """Sampled responses to a batch of prompts."""

    prompts: PromptBatch  # B rows
    tokens: Tensor  # [B, S] int64, prompt then response, right-padded
    lengths: Tensor  # [B] int64, prompt + response tokens, the EOS token included where one was sampled
    prompt_lengths: Tensor  # [B] int64
    log_probs: Tensor  # [B, T] float32 (float64 of a float64 policy), of each token as it was sampled; 0 past the end
    truncated: Tensor  # [B] bool, True where the token limit ended the response: no EOS was sampled, none is added
    responses: list[str]  # B decoded responses; of special tokens those of a format (`<think>`) stay, see `decoded`
    entropy: Tensor | None = None  # [B, T] nats, of the distributions sampled from; None where not known

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Tensor) -> Rollout:
        """The given rows, in that order; as wide as before."""
        return Rollout(
            prompts=self.prompts.take(rows),
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            prompt_lengths=self.prompt_lengths[rows],
            log_probs=self.log_probs[rows],
            truncated=self.truncated[rows],
            responses=[self.responses[row] for row in rows.tolist()],
            entropy=None if self.entropy is None else self.entropy[rows],
        )

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64, response tokens, EOS included."""
        return self.lengths - self.prompt_lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, True on response tokens, EOS included."""
        return length_mask(self.response_lengths, self.log_probs.shape[1])


@dataclass(frozen=True)
class View:
    """What a module wants from the DataModule; modules set it as ``data_view``."""

    kind: ViewKind
    steps: int | None = None  # prompts only: serve this many batches, going round the prompts; None: each row once
    labels: bool = False  # pairs only: data of labelled responses will do as well, and is served as LabelledBatch
    # prompts only: beside them, the best response that their rows have, where they have any
    demonstrations: Beside = "none"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ViewKind)
        check_choice("demonstrations", self.demonstrations, Beside)
