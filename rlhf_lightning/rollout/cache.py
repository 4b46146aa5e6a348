"""The decode loop's cache of keys and values, and the attention that reads it.

Shapes: ``R`` slots, of which the first ``n`` are decoded; ``G`` key and value heads of size ``D``; ``C`` entries that a
slot can hold, of which the first ``kv`` are read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache, PreTrainedModel

from rlhf_lightning.models.layers import attention_of

_NAME = "rlhf_lightning_slots"


class SlotCache(Cache):
    """A cache with one slot for each row. A slot's entries begin at 0, without gaps or padding, whatever its length.

    The memory is allocated once. A step writes each row's new entry in place, at the row's own length. The class is a
    transformers cache, so the model's layers fill it, in one of two modes. In ``prefill`` they read prompts with the
    model's own attention. In ``step`` they read one token for each row, with `slot_attention`.

    Args:
        slots: R.
        capacity: C.
        device: the device of the cache.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)  # [R] entries of each slot
        self._keys: list[Tensor] = []  # [R, G, C, D] for each layer
        self._values: list[Tensor] = []
        self._numbers = torch.arange(max(slots, capacity), device=device)
        self._first = 0  # the first slot that a prefill fills
        self._rows, self._read = 0, 0  # n and kv of a step; n is 0 in a prefill
        self._places: dict[int, Tensor] = {}  # by number of heads: the places that a step writes
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def prefill(self, first: int) -> SlotCache:
        """Switches to prefill mode: the next call fills the slots from ``first`` on with right-padded prompts."""
        self._first, self._rows = first, 0
        return self

    def step(self, rows: int, read: int) -> SlotCache:
        """Switches to step mode: the next call adds one entry to each of the first ``rows`` slots.

        Args:
            rows: n.
            read: kv, larger than the number of entries of any row that has not ended.
        """
        self._rows, self._read = rows, read
        self._places, self._masks = {}, {}
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values, ``[n, G, q, D]``, and returns those that its attention reads."""
        key, value = key_states, value_states
        if not self._rows:
            if layer_idx == len(self._keys):
                self._keys.append(self._zeros(key))
                self._values.append(self._zeros(value))
            slots = slice(self._first, self._first + key.shape[0])
            self._keys[layer_idx][slots, :, : key.shape[2]] = key
            self._values[layer_idx][slots, :, : value.shape[2]] = value
            return key, value
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        for entries, new in ((keys, key), (values, value)):
            flat = entries.view(-1, entries.shape[3])
            flat.index_copy_(0, self._place(entries.shape[1]), new.reshape(-1, entries.shape[3]).to(entries.dtype))
        return keys[: self._rows, :, : self._read], values[: self._rows, :, : self._read]

    def _zeros(self, new: Tensor) -> Tensor:
        # Masked entries are still multiplied, by 0, so the memory must not hold NaN: it begins as zeros.
        # The dtype is attention's, since autocast would otherwise cast the whole cache in every step.
        device = new.device.type
        narrow = torch.is_autocast_enabled(device) and new.dtype == torch.float32
        dtype = torch.get_autocast_dtype(device) if narrow else new.dtype
        return new.new_zeros(self.slots, new.shape[1], self.capacity, new.shape[3], dtype=dtype)

    def _place(self, heads: int) -> Tensor:
        """The flat numbers ``[n * G]`` of the entries that a step writes, over slots, heads and capacity."""
        if heads not in self._places:
            lines = self._numbers[: self._rows, None] * heads + torch.arange(heads, device=self.lengths.device)
            self._places[heads] = (lines * self.capacity + self.lengths[: self._rows, None]).view(-1)
        return self._places[heads]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[n, 1, 1, kv]``: 0 at the entries that a step's rows may see, their new one included, and -inf elsewhere.

        Args:
            window: how many of the last entries a row may see; None for all.
            dtype: the mask's dtype.
        """
        if (window, dtype) not in self._masks:
            # A row that has ended may have more than kv entries. With a window it would then see none, which gives NaN.
            places, last = self._numbers[: self._read], self.lengths[: self._rows, None].clamp(max=self._read - 1)
            hidden = places > last
            if window is not None:
                hidden |= places <= last - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, dtype] = mask[:, None, None]
        return self._masks[window, dtype]

    def move(self, source: Tensor, target: Tensor, read: int) -> None:
        """Copies the first ``read`` entries of the slots ``source`` ``[m]`` to the slots ``target`` ``[m]``."""
        for entries in (*self._keys, *self._values):
            entries[target, :, :read] = entries[source, :, :read]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, since a prefill starts with an empty cache, and a step gives its positions itself."""
        return 0


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: SlotCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token for each row over the row's slot. Layers of transformers call it.

    The query heads that share a key head are treated as rows of it, so keys and values are never repeated in memory.

    Args:
        query: ``[n, A, 1, D]``, A a multiple of G.
        key, value: ``[n, G, kv, D]``, from ``slots``.
        slots: the cache, which knows the rows' lengths; it reaches the layers as an extra argument of the trunk.

    Returns: ``[n, 1, A, D]``, and no attention weights.

    Raises:
        NotImplementedError: the layer uses attention sinks or position biases.
    """
    if s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention sinks and position biases")
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, heads // groups, width).to(key.dtype)
    mask = slots.mask(sliding_window, key.dtype)
    if softcap is None:
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap) + mask
        out = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ value
    return out.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(_NAME, slot_attention)


def slot_attention_in(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Makes the model's layers call `slot_attention`. Transformers then builds no masks of its own."""
    return attention_of(model.base_model, _NAME)
