"""Packed rows: many rows of tokens as one long row, and the copies there and back.

The long row has the real tokens of all rows, one row after the other. Rows may begin with the same tokens, as both
sides of a pair do, or the responses to one prompt. The long row has such a common beginning once, because a causal
model gives it the same states in every row (for pairs: Wang & Hegde 2024, arXiv 2410.20305).

Shapes: ``B`` rows of at most ``S`` tokens, ``N`` in the long row; ``A`` heads of ``D`` numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_SIMILAR = 0.75  # of the longest row's length: shorter ones go into the next call; measured in docs/performance.md


class Beginnings(NamedTuple):
    """What rows have in common with others from their first token on; all on the CPU."""

    lengths: Tensor  # [B] int64
    order: Tensor  # [B] int64, the rows in alphabetical order of their token ids
    shared: Tensor  # [B] int64, in that order: how many first tokens a row has in common with the row before it

    @property
    def size(self) -> int:
        """N: the real tokens, those of common beginnings counted once."""
        return int(self.lengths.sum() - self.shared.sum())


def beginnings(tokens: Tensor, lengths: Tensor) -> Beginnings:
    """Finds the first tokens that right-padded rows have in common.

    Args:
        tokens: ``[B, S]`` int64.
        lengths: ``[B]`` int64; S where they are larger.
    """
    lengths, tokens = lengths.cpu().clamp(max=tokens.shape[1]), tokens.cpu()
    ids = tokens.numpy().astype(">u4")  # big-endian, so that bytes sort as the numbers do
    rows = [row[:length].tobytes() for row, length in zip(ids, lengths.tolist(), strict=True)]
    order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), dtype=torch.int64)
    # Of all the rows before it in this order, a row has most in common with the last.
    now, before = order[1:], order[:-1]
    alike = (tokens[now] == tokens[before]) & (
        torch.arange(tokens.shape[1]) < torch.minimum(lengths[now], lengths[before])[:, None]
    )
    shared = torch.zeros_like(lengths)
    shared[1:] = alike.cumprod(1).sum(1)
    return Beginnings(lengths, order, shared)


class PackedRows:
    """Where each token of right-padded rows stands among the ``N`` of the long row, and the copies there and back.

    Args:
        found: of the rows; N is at least 1.
        width: S.
        device: of the tokens.
    """

    def __init__(self, found: Beginnings, width: int, device: torch.device) -> None:
        ends, order, shared = found
        self.shape = (len(ends), width)
        first, last = shared[:, None], ends[order, None]  # of a row's own tokens, and the one after them
        columns = torch.arange(width)
        own, copied = (columns >= first) & (columns < last), columns < first  # [B, S] in the order of `order`, as below
        starts = (last - first).cumsum(0) - last
        at = torch.minimum(columns, (last - 1).clamp(min=0))  # padding is a copy of the last token; nobody sees it
        owner = torch.where(at >= first, torch.arange(len(ends))[:, None], 0).cummax(0).values
        slots = torch.empty(self.shape, dtype=torch.int64)
        slots[order] = starts[owner, 0] + at
        places = order[:, None] * width + columns
        self.positions = columns.expand(self.shape)[own][None].to(device)  # [1, N]
        self._rows = _Copies(slots.view(-1), places[own], places[copied], device)

        by_length = ends.argsort(descending=True, stable=True)
        self.similar: list[tuple[int, int]] = []  # [n, w] of the rows that are attended to at once
        attended, begins, size = [], torch.zeros_like(ends), 0
        for rows in by_length.split(_similar_counts(ends[by_length].tolist())):
            widest = int(ends[rows[0]])
            if widest == 0:
                break
            self.similar.append((len(rows), widest))
            attended.append(slots[rows, :widest].reshape(-1))
            begins[rows] = size + widest * torch.arange(len(rows))
            size += widest * len(rows)
        places = begins[order, None] + columns
        self._attended = _Copies(torch.cat(attended), places[own], places[copied], device)
        self._masks: dict[tuple[int, int], Tensor] = {}

    @property
    def slots(self) -> Tensor:
        """``[B * S]`` int64, which of the N tokens stands at each place of the rows."""
        return self._rows.slots

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[1, N, ...]``."""
        return x.flatten(0, 1).index_select(0, self._rows.own)[None]

    def spread(self, x: Tensor) -> Tensor:
        """``[1, N, ...]`` -> ``[B, S, ...]``, a copy of the row's last token where padding is, without a gradient."""
        return self._rows.of(x[0]).unflatten(0, self.shape)

    def rows(self, x: Tensor) -> list[Tensor]:
        """``[1, A, N, D]`` -> ``[n, A, w, D]`` for each of ``similar``."""
        parts = self._attended.of(x[0].transpose(0, 1)).split([n * w for n, w in self.similar])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.similar, strict=True)]

    def pack_rows(self, parts: list[Tensor]) -> Tensor:
        """``[n, w, A, D]`` for each of ``similar`` -> ``[1, N, A, D]``."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self._attended.own)[None]

    def window(self, width: int, size: int | None) -> Tensor | None:
        """What a token of ``width`` sees through a sliding window, ``[1, 1, width, width]`` bool; None: all before."""
        if size is None or width <= size:
            return None
        if (width, size) not in self._masks:
            columns = torch.arange(width, device=self.positions.device)
            back = columns[:, None] - columns
            self._masks[width, size] = ((back >= 0) & (back < size))[None, None]
        return self._masks[width, size]


class _Copies:
    """M places, each with a copy of one of N tokens.

    Args:
        slots: ``[M]`` int64, which of the N.
        own: ``[N]`` int64 in M, a token's own place.
        copied: ``[K]`` int64 in M, the places of tokens that have their own elsewhere. The rest is padding.
    """

    def __init__(self, slots: Tensor, own: Tensor, copied: Tensor, device: torch.device) -> None:
        self.slots, self.own, self.copied = (x.to(device) for x in (slots, own, copied))
        self.copied_slots = slots[copied].to(device)  # [K] in N

    def of(self, x: Tensor) -> Tensor:
        """``[N, ...]`` -> ``[M, ...]``."""
        copies: Tensor = _Copy.apply(x, self)
        return copies


class _Copy(torch.autograd.Function):
    """`index_select`, but for the gradient: padding has none, and those of copies add up in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: _Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), copies = gradients, ctx.copies
        total = gradient.index_select(0, copies.own)
        if len(copies.copied):
            wide = torch.promote_types(gradient.dtype, torch.float32)
            more = gradient.index_select(0, copies.copied).to(wide)
            total = total.to(wide).index_add_(0, copies.copied_slots, more).to(gradient.dtype)
        return total, None


def _similar_counts(lengths: list[int]) -> list[int]:
    """How many of the rows, the longest first, are attended to at once, and how many after them."""
    counts: list[int] = []
    widest = 0
    for length in lengths:
        if length < _SIMILAR * widest or not counts:
            counts.append(0)
            widest = length
        counts[-1] += 1
    return counts
