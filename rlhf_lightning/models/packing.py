"""Forward passes without padding: the real tokens of all rows, one after the other, are one long row to the trunk.

All layers but attention treat tokens one by one, so padding is no work for them any more. Attention is of rows, and is
called once for all rows of similar length: their queries, keys and values are put back at their places in rows for it,
and what it gives is packed again.

Shapes: ``B`` rows of at most ``S`` tokens, ``N`` real ones in all; ``A`` heads of ``D`` numbers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rlhf_lightning.models.layers import attention_of, nearly_equal

_NAME = "rlhf_lightning_packed"
_OWN = "sdpa"  # the attention that models come with, and the one that is called on the rows
_WINDOWED = {"full_attention", "sliding_attention"}
_SIMILAR = 0.75  # of the longest row's length: shorter ones go into the next call; measured in docs/performance.md
_WORTH = 0.9  # a larger share of real tokens is not worth the copies that packing makes around attention


class _Similar:
    """Rows of similar length: where their tokens stand in ``[n, w]``, w the longest of them.

    Args:
        lengths: ``[n]`` int64 on the CPU, the longest first.
        device: of the tokens.
    """

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        self.shape = (len(lengths), int(lengths[0]))
        columns = torch.arange(self.shape[1], device=lengths.device)
        places = (columns < lengths[:, None]).view(-1).nonzero()[:, 0]
        self.count = len(places)
        self.places = places.to(device)

    def spread(self, x: Tensor) -> Tensor:
        """The rows' tokens ``[count, ...]`` -> ``[n, w, ...]``, zeros where padding is."""
        return x.unflatten(0, self.shape) if self._whole else _spread(x, self.places, self.shape)

    def pack(self, x: Tensor) -> Tensor:
        """``[n, w, ...]`` -> ``[count, ...]``."""
        flat = x.flatten(0, 1)
        return flat if self._whole else flat.index_select(0, self.places)

    @property
    def _whole(self) -> bool:
        """Whether the rows have no padding, and nothing is to be moved."""
        return self.count == self.shape[0] * self.shape[1]


class PackedRows:
    """Where each real token of right-padded rows stands in the one long row, which has the longest of them first.

    Args:
        lengths: ``[B]`` int64.
        width: S.
    """

    def __init__(self, lengths: Tensor, width: int) -> None:
        self.shape = (len(lengths), width)
        device = lengths.device
        # All on the CPU, which makes a GPU wait once and not for every index.
        lengths, order = lengths.cpu().clamp(max=width).sort(descending=True, stable=True)
        columns = torch.arange(width, device=lengths.device)
        real = columns < lengths[:, None]
        self.places = (order[:, None] * width + columns)[real].to(device)  # [N], in B * S
        self.positions = columns.expand(self.shape)[real][None].to(device)  # [1, N]
        self.similar = [_Similar(part, device) for part in lengths.split(_similar_counts(lengths.tolist()))]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[1, N, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def spread(self, x: Tensor) -> Tensor:
        """``[1, N, ...]`` -> ``[B, S, ...]``, zeros where padding is."""
        return _spread(x[0], self.places, self.shape)

    def window(self, width: int, size: int | None) -> Tensor | None:
        """What a token of ``width`` sees through a sliding window, ``[1, 1, width, width]`` bool; None: all before."""
        if size is None or width <= size:
            return None
        if (width, size) not in self._masks:
            columns = torch.arange(width, device=self.places.device)
            back = columns[:, None] - columns
            self._masks[width, size] = ((back >= 0) & (back < size))[None, None]
        return self._masks[width, size]


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


def _spread(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    rows = x.new_zeros((shape[0] * shape[1], *x.shape[1:]))
    return rows.index_copy(0, places, x).unflatten(0, shape)


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
    """The model's own attention, row by row, called by transformers' layers.

    Args:
        query, key, value: ``[1, A, N, D]``.
        packed: handed to the trunk beside its other arguments.

    Returns: ``[1, N, A, D]``, and no attention weights.
    """
    attention = AttentionInterface()[_OWN]
    counts = [rows.count for rows in packed.similar]
    parts = zip(packed.similar, *(x[0].transpose(0, 1).split(counts) for x in (query, key, value)), strict=True)
    found = []
    for rows, *tokens in parts:
        # Right padding and a causal mask: a real token sees no padding.
        mask = packed.window(rows.shape[1], sliding_window)
        out, _ = attention(module, *(rows.spread(x).transpose(1, 2) for x in tokens), mask, **kwargs)
        found.append(rows.pack(out))
    return torch.cat(found)[None], None


AttentionInterface.register(_NAME, packed_attention)


def attention_is_compiled_around() -> None:
    """Keep torch.compile out of `packed_attention`: every other number of calls in it would be compiled anew."""
    AttentionInterface.register(_NAME, torch.compiler.disable(packed_attention))


def hidden_states(
    trunk: PreTrainedModel, inputs: Tensor, lengths: Tensor, packs: bool, below: int | None = None
) -> tuple[Tensor | None, Tensor]:
    """What the trunk makes of right-padded rows; nothing is computed for padding where it is worth that.

    No attention mask: in a causal model the real tokens of a right-padded row never see the padding after them, and
    without a mask the attention kernels take their fast causal path.

    Args:
        inputs: token ids ``[B, S]`` int64, or what stands for their embeddings, ``[B, S, H]``.
        lengths: ``[B]`` int64; S where they are larger.
        packs: whether this trunk's layers can be called without padding, see `can_pack`.
        below: the hidden state that many layers below the last is wanted too.

    Returns: the state below (None where none is wanted) and the last one, ``[B, S, H]`` each; past a row's end they
        are zeros, or finite numbers without a meaning.
    """
    name = "input_ids" if inputs.dim() == 2 else "inputs_embeds"
    arguments: dict[str, Any] = {"use_cache": False, "output_hidden_states": below is not None}
    width = inputs.shape[1]
    if packs and int(lengths.clamp(max=width).sum()) < _WORTH * inputs.shape[0] * width:
        packed = PackedRows(lengths, width)
        with attention_of(trunk, _NAME):
            output = trunk(**{name: packed.pack(inputs)}, position_ids=packed.positions, packed=packed, **arguments)
        found = None if below is None else packed.spread(output.hidden_states[-1 - below])
        return found, packed.spread(output.last_hidden_state)
    if takes_positions(trunk):
        arguments["position_ids"] = torch.arange(width, device=inputs.device).expand(inputs.shape[:2])
    output = trunk(**{name: inputs}, **arguments)
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
