"""The ids of a model that stand for a token. The others are never sampled and have no share in any probability.

Embeddings are often padded to a round number of rows (Qwen's by some hundred), and some tokenizers have no token for
ids below their highest (Phi-4's). A response with such an id could be read by nobody: not by a reward model, whose
embeddings may end before it, and not as text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Vocabulary(nn.Module):
    """The rows of a language-model head that count.

    Where only rows past the last token are left out, as for nearly all models, the rest of them is a view. A tokenizer
    with holes below its highest id costs a copy of the head's weight in every pass.

    Args:
        rows: R, of the head.
        ids: the ids that have a token, each below R; None: all.

    Attributes:
        size: V, the highest id that has a token, plus 1.
        whole: whether all rows count.
    """

    ids: Tensor | None
    _places: Tensor | None
    _holes: Tensor | None

    def __init__(self, rows: int, ids: Sequence[int] | None = None) -> None:
        super().__init__()
        known = torch.tensor(range(rows) if ids is None else sorted(set(ids)), dtype=torch.int64, device="cpu")
        self.size = int(known[-1]) + 1
        self.whole = len(known) == rows
        assert self.size <= rows, "a tokenizer of other ids than the model's, see loading.check_vocabularies"
        holed = len(known) < self.size
        places = torch.full((self.size,), len(known), dtype=torch.int64, device="cpu")  # no row: an error in operators
        places[known] = torch.arange(len(known), device="cpu")
        # Buffers, so that they move with the model; they are made of the tokenizer, so no checkpoint holds them.
        self.register_buffer("ids", known if holed else None, persistent=False)  # [U]
        self.register_buffer("_places", places if holed else None, persistent=False)  # [V], of an id among the U
        self.register_buffer("_holes", places == len(known) if holed else None, persistent=False)  # [V] bool

    def weight(self, weight: Tensor) -> Tensor:
        """The head's weight, cut to the rows that count: ``[R, H]`` -> ``[U, H]``."""
        return weight[: self.size] if self.ids is None else weight.index_select(0, self.ids)

    def places(self, tokens: Tensor) -> Tensor:
        """Which of the U rows stands for each token: int64 ids of any shape."""
        return tokens if self._places is None else self._places[tokens]

    def logits(self, logits: Tensor) -> Tensor:
        """``[..., R]`` -> ``[..., V]``, -inf where no token is."""
        logits = logits[..., : self.size]
        return logits if self._holes is None else logits.masked_fill(self._holes, -torch.inf)

    def strangers(self, tokens: Tensor) -> Tensor:
        """True where an id has no token: int64 of any shape -> bool."""
        beyond = (tokens < 0) | (tokens >= self.size)
        return beyond if self._holes is None else beyond | self._holes[tokens.clamp(0, self.size - 1)]
