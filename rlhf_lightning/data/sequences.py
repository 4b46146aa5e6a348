"""Joins pieces of ids to one sequence: marks the assistant's tokens, finds the response, and cuts from the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = list[int]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The ids of a prompt, then in turn of what the assistant says and of what others say in between."""

    ids: tuple[Ids, ...]

    @property
    def context(self) -> int:
        """Tokens before the assistant's last turn."""
        return sum(map(len, self.ids[:-1])) if len(self.ids) > 1 else len(self.ids[0])

    @property
    def response(self) -> int:
        """Tokens after the prompt."""
        return sum(map(len, self.ids[1:]))

    @property
    def longest_turn(self) -> int:
        """Tokens of the assistant's longest turn."""
        return max(map(len, self.ids[1::2]), default=0)

    def cut(self, over: int, bos: int | None) -> Pieces:
        """Removes ``over`` tokens at the beginning. A first BOS stays if another token before the last turn is left.

        Assistant turns that are cut or removed become part of the prompt.
        """
        if over <= 0:
            return self
        first = self.ids[0][:1] if self.ids[0][0] == bos and self.context - over > 1 else []
        over += len(first)
        ids = list(self.ids)
        while len(ids) > 2 and over >= len(ids[0]):
            over -= len(ids[0])
            ids = [ids[1] + ids[2], *ids[3:]]
        return Pieces((first + ids[0][over:], *ids[1:]))


def split(pieces: Pieces, prompt: int) -> tuple[Array, Array | None]:
    """The ids after the first ``prompt`` ones, int32, and a mask of those that the assistant says; None for all.

    Arrays, since a small tensor takes six times as much memory.
    """
    ids = [id for piece in pieces.ids for id in piece]
    said = [number % 2 == 1 for number, piece in enumerate(pieces.ids) for _ in piece]
    mask = None if all(said[prompt:]) else np.array(said[prompt:], dtype=np.bool_)
    return np.array(ids[prompt:], dtype=np.int32), mask


def common_prompt(sides: Sequence[Pieces]) -> Ids:
    """The common beginning of all sides' prompts."""
    prompts = [side.ids[0] for side in sides]
    shortest = min(prompts, key=len)
    length = next((i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), len(shortest))
    return shortest[:length]
