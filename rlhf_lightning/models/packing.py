"""Forward passes over one long row of tokens, so that nothing is computed for padding or computed twice.

`packed_rows.PackedRows` makes that row. All layers but attention treat tokens one by one, so they do no work for
padding and compute a common beginning once. Attention needs rows: for it, the queries, keys and values are copied back
to rows, rows of similar length share one call, and its output is packed again.

Shapes: ``B`` rows of at most ``S`` tokens, ``N`` in the long row; ``A`` heads of ``D`` numbers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlhf_lightning.models.layers import attention_of, nearly_equal
from rlhf_lightning.models.loading import check_length
from rlhf_lightning.models.packed_rows import PackedRows, beginnings
from rlhf_lightning.models.positions import rope_limit
from rlhf_lightning.models.routers import Routers, routing

_NAME = "rlhf_lightning_packed"
_OWN = "sdpa"  # the attention that models come with, and the one that is called on the rows
_WINDOWED = {"full_attention", "sliding_attention"}
_WORTH = 0.9  # a larger share of the padded rows is not worth the copies that packing makes around attention


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
    """Keeps torch.compile out of `packed_attention`: it would compile each new number of calls in it again."""
    AttentionInterface.register(_NAME, torch.compiler.disable(packed_attention))


def hidden_states(
    trunk: PreTrainedModel,
    tokens: Tensor,
    lengths: Tensor,
    packs: bool,
    routers: Routers | None = None,
) -> Tensor:
    """The trunk's hidden states of right-padded rows, packed where that saves enough.

    No attention mask: in a causal model the real tokens of a right-padded row never see the padding after them, and
    without a mask the attention kernels take their fast causal path.

    Args:
        tokens: ``[B, S]`` int64.
        lengths: ``[B]`` int64; S where they are larger.
        packs: whether this trunk's layers can be called without padding, see `can_pack`.
        routers: remember what the trunk's routers say, where the pass has a gradient.

    Returns: the last hidden states, ``[B, S, H]``; past a row's end they are finite numbers without a meaning, which
        must get no gradient.

    Raises:
        InputError: rows past the length up to which the trunk's positions do not depend on the rows beside them.
    """
    if rope_limit(trunk.config) is not None:
        longest, width = int(lengths.max()), tokens.shape[1]
        check_length(trunk, longest, trunk.name_or_path or "model")
        if longest < width:  # padding would count as positions that are taken
            states = hidden_states(trunk, tokens[:, :longest], lengths, packs, routers)
            return nn.functional.pad(states, (0, 0, 0, width - longest))
    arguments: dict[str, Any] = {"use_cache": False}
    arguments |= routing(trunk, routers is not None and torch.is_grad_enabled())
    rows, width = tokens.shape
    packed = None
    with torch.device("cpu"):  # where indices are made; Lightning's default device is another
        begin = beginnings(tokens, lengths) if packs else None
        if begin is not None and 0 < begin.size < _WORTH * rows * width:
            packed = PackedRows(begin, width, tokens.device)
    if packed is not None:
        arguments |= {"input_ids": packed.pack(tokens), "position_ids": packed.positions, "packed": packed}
        with attention_of(trunk, _NAME):
            output = trunk(**arguments)
    else:
        if takes_positions(trunk):
            arguments["position_ids"] = torch.arange(width, device=tokens.device).expand(rows, width)
        output = trunk(input_ids=tokens, **arguments)
    if routers is not None:
        routers.remember(output, lengths, tokens.shape, None if packed is None else packed.slots)
    states = output.last_hidden_state
    return states if packed is None else packed.spread(states)


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
    expected = hidden_states(trunk, tokens, lengths, packs=False)
    try:
        got = hidden_states(trunk, tokens, lengths, packs=True)
    except Exception:  # whatever a model's code makes of arguments that it does not know
        return False
    real = torch.arange(4, device=device) < lengths[:, None]
    return nearly_equal(got[real], expected[real], expected.dtype)
