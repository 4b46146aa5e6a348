"""Forward passes without padding, and without computing anything twice: one long row of tokens is given to the trunk.

It has the real tokens of all rows, one row after the other. Rows that begin alike, as both sides of a pair and the
responses to one prompt do, have that beginning in it once: a causal model makes the same of it in all of them (for
pairs: Wang & Hegde 2024, arXiv 2410.20305). All layers but attention treat tokens one by one, so the rest is no work
for them any more. Attention is of rows, and is called once for all rows of similar length: their queries, keys and
values are put back at their places in rows for it, and what it gives is packed again.

Shapes: ``B`` rows of at most ``S`` tokens, ``N`` in the long row; ``A`` heads of ``D`` numbers.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlhf_lightning.models.layers import attention_of, nearly_equal
from rlhf_lightning.models.loading import check_length
from rlhf_lightning.models.positions import rope_limit
from rlhf_lightning.models.routers import Routers, routing

_NAME = "rlhf_lightning_packed"
_OWN = "sdpa"  # the attention that models come with, and the one that is called on the rows
_WINDOWED = {"full_attention", "sliding_attention"}
_SIMILAR = 0.75  # of the longest row's length: shorter ones go into the next call; measured in docs/performance.md
_WORTH = 0.9  # a larger share of the padded rows is not worth the copies that packing makes around attention


class Beginnings(NamedTuple):
    """What rows have in common with others from their first token on; all on the CPU."""

    lengths: Tensor  # [B] int64
    order: Tensor  # [B] int64, the rows as a dictionary has them
    shared: Tensor  # [B] int64, in that order: the tokens that a row begins with as the one before it does

    @property
    def size(self) -> int:
        """N: the tokens that are left, those of common beginnings counted once."""
        return int(self.lengths.sum() - self.shared.sum())


def beginnings(inputs: Tensor, lengths: Tensor) -> Beginnings:
    """What right-padded rows begin with alike.

    Args:
        inputs: token ids ``[B, S]`` int64; or what stands for embeddings, ``[B, S, H]``, of which nothing is known to
            be alike.
        lengths: ``[B]`` int64; S where they are larger.
    """
    lengths = lengths.cpu().clamp(max=inputs.shape[1])
    if inputs.dim() == 3:
        return Beginnings(lengths, torch.arange(len(lengths)), torch.zeros_like(lengths))
    tokens = inputs.cpu()
    ids = tokens.numpy().astype(">u4")  # so that bytes are in the order of numbers, which are fast to compare
    rows = [row[:length].tobytes() for row, length in zip(ids, lengths.tolist(), strict=True)]
    order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), dtype=torch.int64)
    # No row has more in common with any before it than with the last of them.
    now, before = order[1:], order[:-1]
    alike = (tokens[now] == tokens[before]) & (
        torch.arange(tokens.shape[1]) < torch.minimum(lengths[now], lengths[before])[:, None]
    )
    shared = torch.zeros_like(lengths)
    shared[1:] = alike.cumprod(1).sum(1)
    return Beginnings(lengths, order, shared)


class PackedRows:
    """Where each token of right-padded rows stands among the ``N`` that the trunk is given.

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


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedRows,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The model's own attention of the rows, called by transformers' layers.

    Args:
        query, key, value: ``[1, A, N, D]``.
        packed: handed to the trunk beside its other arguments.

    Returns: ``[1, N, A, D]``, and no attention weights.
    """
    attention = AttentionInterface()[_OWN]
    found = []
    for queries, keys, values in zip(*map(packed.rows, (query, key, value)), strict=True):
        # Right padding and a causal mask: a real token sees no padding.
        mask = packed.window(queries.shape[2], sliding_window)
        found.append(attention(module, queries, keys, values, mask, **kwargs)[0])
    return packed.pack_rows(found), None


AttentionInterface.register(_NAME, packed_attention)


def attention_is_compiled_around() -> None:
    """Keep torch.compile out of `packed_attention`: every other number of calls in it would be compiled anew."""
    AttentionInterface.register(_NAME, torch.compiler.disable(packed_attention))


def hidden_states(
    trunk: PreTrainedModel,
    inputs: Tensor,
    lengths: Tensor,
    packs: bool,
    below: int | None = None,
    routers: Routers | None = None,
) -> tuple[Tensor | None, Tensor]:
    """What the trunk makes of right-padded rows; nothing is computed for padding where it is worth that.

    No attention mask: in a causal model the real tokens of a right-padded row never see the padding after them, and
    without a mask the attention kernels take their fast causal path.

    Args:
        inputs: token ids ``[B, S]`` int64, or what stands for their embeddings, ``[B, S, H]``.
        lengths: ``[B]`` int64; S where they are larger.
        packs: whether this trunk's layers can be called without padding, see `can_pack`.
        below: the hidden state that many layers below the last is wanted too.
        routers: remember what the trunk's routers say, where the pass has a gradient.

    Returns: the state below (None where none is wanted) and the last one, ``[B, S, H]`` each; past a row's end they
        are finite numbers without a meaning, which must get no gradient.

    Raises:
        InputError: rows past the length up to which the trunk's positions do not depend on the rows beside them.
    """
    if rope_limit(trunk.config) is not None:
        longest, width = int(lengths.max()), inputs.shape[1]
        check_length(trunk, longest, trunk.name_or_path or "model")
        if longest < width:  # padding would count as positions that are taken
            low, last = hidden_states(trunk, inputs[:, :longest], lengths, packs, below, routers)
            fill = (0, 0, 0, width - longest)
            return None if low is None else nn.functional.pad(low, fill), nn.functional.pad(last, fill)
    name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
    arguments: dict[str, Any] = {"use_cache": False, "output_hidden_states": below is not None}
    arguments |= routing(trunk, routers is not None and torch.is_grad_enabled())
    width = inputs.shape[1]
    packed = None
    with torch.device("cpu"):  # where indices are made; Lightning's default device is another
        begin = beginnings(inputs, lengths) if packs else None
        if begin is not None and 0 < begin.size < _WORTH * inputs.shape[0] * width:
            packed = PackedRows(begin, width, inputs.device)
    if packed is not None:
        with attention_of(trunk, _NAME):
            output = trunk(**{name: packed.pack(inputs)}, position_ids=packed.positions, packed=packed, **arguments)
        if routers is not None:
            routers.remember(output, lengths, inputs.shape, packed.slots)
        found = None if below is None else packed.spread(output.hidden_states[-1 - below])
        return found, packed.spread(output.last_hidden_state)
    if takes_positions(trunk):
        arguments["position_ids"] = torch.arange(width, device=inputs.device).expand(inputs.shape[:2])
    output = trunk(**{name: inputs}, **arguments)
    if routers is not None:
        routers.remember(output, lengths, inputs.shape)
    return None if below is None else output.hidden_states[-1 - below], output.last_hidden_state


def takes_positions(trunk: PreTrainedModel) -> bool:
    """Whether the trunk is told each token's position."""
    return "position_ids" in inspect.signature(trunk.forward).parameters


@torch.no_grad()
def can_pack(trunk: PreTrainedModel) -> bool:
    """Whether the trunk gives the same states without padding, tried on two short rows."""
    config: Any = trunk.config
    kinds = set(getattr(config, "layer_types", None) or ())
    known = getattr(trunk, "_supports_attention_backend", False) and config._attn_implementation == _OWN
    if not known or not kinds <= _WINDOWED or getattr(trunk, "_is_stateful", False) or not takes_positions(trunk):
        return False
    device = next(trunk.parameters()).device
    tokens = torch.arange(8, device=device).view(2, 4) % min(8, trunk.config.get_text_config().vocab_size)
    lengths = torch.tensor([4, 2], device=device)
    expected = hidden_states(trunk, tokens, lengths, packs=False)[1]
    try:
        got = hidden_states(trunk, tokens, lengths, packs=True)[1]
    except Exception:  # whatever a model's code makes of arguments that it does not know
        return False
    real = torch.arange(4, device=device) < lengths[:, None]
    return nearly_equal(got[real], expected[real], expected.dtype)
