"""The batches that the data side passes to the modules, and the rollouts, with a shape on every field.

Shapes: ``B`` rows, ``S`` prompt + response tokens, ``P`` prompt tokens, ``T`` response tokens. Sequences are
right-padded and carry their lengths. Masks are made from lengths, never from ``tokens != pad``, so the pad token may
equal EOS. Masks are bool and True counts.

Batches are plain dataclasses with their own ``.to``, and are never changed. (They are not frozen, because Lightning
rebuilds dataclass batches field by field.)
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
    """Groups row numbers so that a group's padded tokens (rows times longest row) stay within the budget.

    Args:
        lengths: ``[B]`` int64, tokens in each row.
        budget: most padded tokens in a group; a single longer row is a group of its own.

    Returns: int64 tensors that together hold every row number once. Rows of similar length are together, the longest
    first, so that a lack of memory shows at once.
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
        """A copy with every tensor (also of nested batches) on ``device``. Other values are shared, not copied."""
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
    # [B, T] bool, True on the assistant's own words; False on the user's and tools' words between its turns, and past
    # the end. None if the assistant says all of every response.
    spoken: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def mask(self) -> Tensor:
        """[B, S] bool, True on real tokens."""
        return length_mask(self.lengths, self.tokens.shape[1])

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, True on the response tokens that count in losses and measurements."""
        if self.spoken is not None:
            return self.spoken
        steps = self.lengths - self.prompt_lengths
        return length_mask(steps, int(steps.max()))

    @property
    def response_weights(self) -> Tensor:
        """[B, T] float32, how much each response token counts: its row's weight, or 0 if it does not count."""
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
    margins: Tensor  # [B] float32, by how much the chosen one is better, in reward units; 0 if not given
    weights: Tensor  # [B] float32, how much the pair counts; 0 marks a filler row
    # [B] float32, the probability that the chosen one is preferred, from 0.5 (a tie) to 1; None for 1
    preferences: Tensor | None = None

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
    columns: dict[str, list[Any]]  # the rows' other columns, each a list of B; reward functions get them by name
    # B rows, the data's responses to the same prompts; an empty response of weight 0 if a row has none
    demonstrations: DemonstrationBatch | None = None
    # B prompts as chat templates read them: `messages` (the last may be the beginning of the assistant's answer) and
    # `tools`, a list or None. A prompt that is plain text has None; the field is None if all prompts are plain text.
    conversations: list[dict[str, Any] | None] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def repeat(self, times: int) -> PromptBatch:
        """Every prompt ``times`` times in a row: ``[B]`` rows -> ``[B * times]`` rows, without demonstrations.

        Copy k of row r has the number ``r * times + k``, so that each copy gets its own draws.
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
    lengths: Tensor  # [B] int64, prompt + response tokens, with the EOS token if one was sampled
    prompt_lengths: Tensor  # [B] int64
    log_probs: Tensor  # [B, T] float32 (float64 of a float64 policy), of each token as it was sampled; 0 past the end
    truncated: Tensor  # [B] bool, True if the token limit ended the response: no EOS was sampled, none is added
    responses: list[str]  # B decoded responses; special tokens of a format (`<think>`) stay, see `decoded`
    entropy: Tensor | None = None  # [B, T] nats, of the distributions sampled from; None if unknown

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: Tensor) -> Rollout:
        """The given rows, in that order. The widths stay the same."""
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
    steps: int | None = None  # prompts only: serve this many batches, pass after pass; None: each row once
    labels: bool = False  # pairs only: labelled responses are also accepted, and served as LabelledBatch
    soft: bool = False  # pairs only: pairs of which it is not certain who is better are accepted
    # prompts only: for which prompts to serve their rows' best responses, too
    demonstrations: Beside = "none"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ViewKind)
        check_choice("demonstrations", self.demonstrations, Beside)
