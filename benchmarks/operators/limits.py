"""The limit of the machine for a case, measured as one more entrant of the same run.

Of a memory-bound operator: the bytes that this implementation moves, at the copy bandwidth, which a copy of as many
bytes into warm memory has. The forward's results for its backward are among them, so this is our own limit, not a bound
for every implementation. Of the linear ones: the matrix products that it takes, into results that are already there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from operators.cases import BACKWARD, BOTH, FORWARD, Case

ONE_TILE = 256  # rows up to which linear_cross_entropy holds all logits of 16 bits at once, on a CPU


def bytes_moved(case: Case) -> int:
    """What this implementation reads and writes in a call, with what it keeps for its backward, each once, in bytes."""
    width = torch.finfo(getattr(torch, case.dtype)).bits // 8
    shape = case.shape
    if case.operator == "token_log_probs":
        logits, tokens = shape["N"] * shape["V"] * width, shape["N"]
        # Forward: logits and tokens in; log-probability, entropy and two numbers kept for the backward out.
        # Backward: logits, tokens, three kept numbers and two gradients in; the gradient out.
        return _by_pass(case, logits + tokens * (8 + 4 * 4), 2 * logits + tokens * (8 + 5 * 4))
    if case.operator == "gae":  # rewards, values, mask in; advantages, returns out
        return shape["B"] * shape["T"] * (2 * width + 1 + 2 * 4)
    if case.operator == "sample_tokens":  # logits and draws in; token, log-probability and entropy out
        return shape["B"] * (shape["V"] * width + 8 + 8 + 2 * 4)
    # Forward: three tensors in; loss, clipped and slope out. Backward: slope and the gradient in, the gradient out.
    return _by_pass(case, shape["N"] * (3 * width + 4 + 1 + 4), shape["N"] * (4 + 4 + width))


def _by_pass(case: Case, forward: int, backward: int) -> int:
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[case.passes]


def products(case: Case, device: str) -> int:
    """How many products of ``2 N H V`` operations this implementation takes."""
    whole_tiles = case.dtype in ("float32", "float64") or case.shape["N"] <= ONE_TILE
    if case.operator == "linear_cross_entropy" and device == "cpu" and whole_tiles:
        return 3  # logits, and both gradients in the forward
    return {FORWARD: 1, BOTH: 4}[case.passes]  # the logits are not kept: the backward makes them again


def work(case: Case, device: str) -> dict[str, float]:
    """For the report: what the limit does, as ``{"bytes": ...}`` or ``{"flops": ..., "products": ...}``."""
    if not case.operator.startswith("linear"):
        return {"bytes": bytes_moved(case)}
    count = products(case, device)
    return {"flops": count * 2.0 * case.shape["N"] * case.shape["H"] * case.shape["V"], "products": count}


def limit(case: Case, device: str) -> Callable[[], object]:
    """The call whose time is the limit."""
    dtype = getattr(torch, case.dtype)
    if not case.operator.startswith("linear"):
        source = torch.ones(bytes_moved(case) // 2 // 4, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)
    count, width, columns = case.shape["N"], case.shape["H"], case.shape["V"]
    hidden = torch.randn(count, width, device=device).to(dtype)
    weight = torch.randn(columns, width, device=device).to(dtype)
    logits = torch.zeros(count, columns, dtype=dtype, device=device)
    hidden_gradient, weight_gradient = torch.zeros_like(hidden), torch.zeros_like(weight)

    taken = products(case, device)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if taken == 4:
            torch.mm(hidden, weight.T, out=logits)
        if taken > 1:
            torch.mm(logits, weight, out=hidden_gradient)
            torch.mm(logits.T, hidden, out=weight_gradient)

    return run
