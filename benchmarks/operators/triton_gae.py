"""GAE as a Triton kernel with one thread a row: what the loop becomes where nobody thinks about memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from operators.inputs import GAMMA, LAM, Inputs

_ROWS = 32  # of one program, which is one warp


@triton.jit
def _gae(
    rewards,
    values,
    mask,
    advantages,
    returns,
    rows,
    length,
    GAMMA: tl.constexpr,
    DECAY: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    following = tl.zeros((ROWS,), tl.float32)
    advantage = tl.zeros((ROWS,), tl.float32)
    for step in range(length):
        at = row * length + (length - 1 - step)
        counted = tl.load(mask + at, mask=inside, other=0) != 0
        value = tl.load(values + at, mask=inside, other=0.0)
        error = tl.load(rewards + at, mask=inside, other=0.0) + GAMMA * following - value
        advantage = tl.where(counted, error + DECAY * advantage, advantage)
        following = tl.where(counted, value, following)
        tl.store(advantages + at, tl.where(counted, advantage, 0.0), mask=inside)
        tl.store(returns + at, tl.where(counted, advantage + value, 0.0), mask=inside)


def gae(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Advantages and returns."""
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"]
    rows, length = rewards.shape
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    bits = mask.view(torch.uint8)
    grid = (triton.cdiv(rows, _ROWS),)
    _gae[grid](rewards, values, bits, advantages, returns, rows, length, GAMMA, GAMMA * LAM, _ROWS, num_warps=1)
    return {"advantages": advantages, "returns": returns}
