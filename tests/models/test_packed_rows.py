"""Every token of the rows finds its place in the long row, and its copies find the way back, gradients included."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from rlhf_lightning.models.packed_rows import PackedRows, beginnings

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(6))
def test_every_token_finds_its_own_state_and_its_gradient(seed: int) -> None:
    """Of many rows of two words, alike for as long as chance has it: what comes back is what was put in, for each."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (40, 7), generator=draw)
    lengths = torch.randint(0 if seed else 1, 9, (40,), generator=draw)  # some are longer than the tokens
    packed = PackedRows(beginnings(tokens, lengths), 7, lengths.device)
    ends = lengths.clamp(max=7).tolist()
    different = {tuple(row[: t + 1]) for row, n in zip(tokens.tolist(), ends, strict=True) for t in range(n)}
    powers = (tokens + 1) * 3 ** torch.arange(7)
    states = powers.cumsum(1).double().requires_grad_()  # a number of its own for every beginning
    one = packed.pack(states[..., None])  # [1, N, 1]
    assert one.unique().numel() == one.numel() == len(different) == beginnings(tokens, lengths).size
    attended = packed.pack_rows([rows.transpose(1, 2) for rows in packed.rows(one[:, None])])[..., 0]
    assert torch.equal(attended, one) and torch.equal(packed.positions[0], positions_of(one[0, :, 0]))
    found = packed.spread(one)[..., 0]
    real = torch.arange(7) < lengths[:, None]
    assert torch.equal(found[real], states[real])
    (one_gradient,) = torch.autograd.grad((found * real).sum(), one)
    times = Counter(states[real].tolist())
    assert one_gradient.flatten().tolist() == [times[state] for state in one.flatten().tolist()]


def positions_of(states: Tensor) -> Tensor:
    """Of the numbers above: how many powers of three are in them, less one."""
    return (3 ** torch.arange(1, 8) <= 2 * states[:, None] + 1).sum(1) - 1


def test_gradients_of_what_many_rows_begin_with_add_up_in_more_than_16_bits() -> None:
    rows = 600
    packed = PackedRows(
        beginnings(torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)), 1, CPU
    )
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    torch.cat(packed.rows(one)).sum().backward()
    assert one.grad is not None and abs(one.grad.item() - rows) <= 2  # 256 where each is rounded on its own
