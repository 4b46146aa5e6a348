"""What is measured: operators, shapes, dtypes, passes, who takes part, the goals, and what the machine could do.

The limit of the machine is measured as one more entrant of the same run. Of a memory-bound operator: the bytes that
this implementation moves, at the copy bandwidth, which a copy of as many bytes into warm memory has. The forward's
results for its backward are among them, so this is our own limit, not a bound for every implementation. Of the linear
ones: the matrix products that it takes, into results that are already there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch's own: large CPU tensors are aligned, and advised to the kernel

# The peers, by the names under which they are reported.
CROSS_ENTROPY = "F.cross_entropy"
COMPILED_CROSS_ENTROPY = "torch.compile, F.cross_entropy"
BF16_CROSS_ENTROPY = "F.cross_entropy, bf16 logits"
COMPILED_BF16_CROSS_ENTROPY = "torch.compile, F.cross_entropy, bf16 logits"
GATHER = "log_softmax, gather"
TRL_SELECTIVE = "TRL selective_log_softmax"
LIGER = "Liger cross-entropy"
FLASH = "flash-attn Triton cross-entropy"
UNFUSED = "matmul, F.cross_entropy"
TRL_CHUNKED = "TRL chunked log-probs"
LIGER_LINEAR = "Liger fused linear cross-entropy"
CCE = "Apple CCE, unfiltered"
TRL_LOOP = "TRL's loop, re-typed"
VERL_LOOP = "verl's loop, whitens too"
COMPILED_LOOP = "torch.compile, loop"
ROW_KERNEL = "one thread a row (Triton)"
SCAN = "log-step scan (torch)"
MULTINOMIAL = "softmax, multinomial"
EAGER = "eager"
COMPILED = "torch.compile"
COMPILES = (COMPILED_CROSS_ENTROPY, COMPILED_BF16_CROSS_ENTROPY, COMPILED_LOOP, COMPILED)

OURS, LIMIT = "ours", "limit"  # as entrants; LIMIT in goals too
OPERATORS = (
    "token_log_probs",
    "linear_token_log_probs",
    "linear_cross_entropy",
    "gae",
    "clipped_policy_loss",
    "clipped_value_loss",
    "sample_tokens",
)

ONE_TILE = 256  # rows up to which linear_cross_entropy holds all logits of 16 bits at once, on a CPU


class Entrant(NamedTuple):
    """Who takes part: its function in `sides.py` (of LIMIT: here), folder of build/peers, package (the first found)."""

    function: str
    folder: str | None = None  # None: nothing but torch
    packages: tuple[str, ...] = ("torch",)


ENTRANTS = {
    OURS: Entrant("ours"),
    LIMIT: Entrant("limit"),
    CROSS_ENTROPY: Entrant("cross_entropy"),
    COMPILED_CROSS_ENTROPY: Entrant("compiled_cross_entropy"),
    BF16_CROSS_ENTROPY: Entrant("direct_cross_entropy"),
    COMPILED_BF16_CROSS_ENTROPY: Entrant("compiled_direct_cross_entropy"),
    GATHER: Entrant("gather"),
    UNFUSED: Entrant("unfused"),
    TRL_LOOP: Entrant("trl_loop"),
    COMPILED_LOOP: Entrant("compiled_loop"),
    SCAN: Entrant("log_step_scan"),
    MULTINOMIAL: Entrant("multinomial"),
    EAGER: Entrant("eager_loss"),
    COMPILED: Entrant("compiled_loss"),
    ROW_KERNEL: Entrant("thread_per_row", None, ("triton", "pytorch-triton")),
    TRL_SELECTIVE: Entrant("trl_selective", "trl", ("trl",)),
    TRL_CHUNKED: Entrant("trl_chunked", "trl", ("trl",)),
    VERL_LOOP: Entrant("verl_loop", "verl", ("verl",)),
    LIGER: Entrant("liger", "liger", ("liger-kernel",)),
    LIGER_LINEAR: Entrant("liger_linear", "liger", ("liger-kernel",)),
    CCE: Entrant("apple_cce", "cce", ("cut-cross-entropy",)),
    FLASH: Entrant("flash", "flash_attn", ("flash-attn",)),
}

FILTERS = ("top_k", "top_p")  # in the shape of a case, but no sizes


@dataclass(frozen=True)
class Case:
    """One row of the results.

    ``shape``: the sizes, and the filters of sampling. ``goals``: the factor by which each peer's time must exceed ours;
    under ``limit`` the factor by which ours may exceed the limit's time. ``memory_goal``: MiB that a call may hold
    beyond its inputs and results.
    """

    operator: str
    shape: dict[str, float]
    dtype: str
    passes: str
    peers: tuple[str, ...]
    goals: dict[str, float] = field(default_factory=dict)
    memory_goal: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


def _bytes(shape: dict[str, int], dtype: str) -> int:
    return shape["N"] * shape["V"] * (4 if dtype == "float32" else 2)


def _sampling(rows: int, columns: int, dtype: str) -> list[Case]:
    """The tokens of one step of a rollout, drawn without a filter and with each of the two."""
    filters: tuple[dict[str, float], ...] = ({}, {"top_k": 50}, {"top_p": 0.9})
    shapes = [{"B": rows, "V": columns, **chosen} for chosen in filters]
    return [Case("sample_tokens", shape, dtype, FORWARD, (MULTINOMIAL,)) for shape in shapes]


def cpu_cases() -> list[Case]:
    """The rows on a CPU."""
    rows = {"N": 1024, "V": 49152}
    head = {"N": 1024, "H": 576, "V": 49152}
    fast = {CROSS_ENTROPY: 4.5, TRL_SELECTIVE: 9.0}
    torchs = (CROSS_ENTROPY, GATHER, TRL_SELECTIVE)
    cases = [
        Case("token_log_probs", rows, "float32", FORWARD, torchs),
        Case("token_log_probs", rows, "float32", BOTH, torchs, fast),
        Case("token_log_probs", rows, "float32", BOTH, torchs, {CROSS_ENTROPY: 2.5}, environment=HUGE_PAGES),
        Case("token_log_probs", rows, "bfloat16", BOTH, torchs),
    ]
    for operator in ("linear_token_log_probs", "linear_cross_entropy"):
        for dtype, factor in (("float32", 1.10), ("bfloat16", 1.25)):
            memory = 0.05 * _bytes(head, dtype) / 2**20
            cases.append(Case(operator, head, dtype, BOTH, (UNFUSED, TRL_CHUNKED), {LIMIT: factor}, memory))
    loops = {TRL_LOOP: 100.0, VERL_LOOP: 100.0}
    cases += [
        Case("gae", {"B": 256, "T": 128}, "float32", FORWARD, (TRL_LOOP, VERL_LOOP, COMPILED_LOOP)),
        Case("gae", {"B": 256, "T": 1024}, "float32", FORWARD, (TRL_LOOP, VERL_LOOP), {**loops, LIMIT: 2.0}),
        Case("gae", {"B": 4096, "T": 2048}, "float32", FORWARD, (TRL_LOOP, VERL_LOOP), {**loops, LIMIT: 2.0}),
    ]
    for operator in ("clipped_policy_loss", "clipped_value_loss"):
        goals = {EAGER: 5.0, COMPILED: 1.2}
        cases.append(Case(operator, {"N": 65536}, "float32", BOTH, (EAGER, COMPILED), goals))
    return cases + _sampling(16, 49152, "float32")


def cuda_cases() -> list[Case]:
    """The rows on a GPU; the goals are an H200's."""
    rows = {"N": 8192, "V": 128256}
    head = {"N": 8192, "H": 4096, "V": 128256}
    direct = (BF16_CROSS_ENTROPY, COMPILED_BF16_CROSS_ENTROPY)
    torchs = (CROSS_ENTROPY, COMPILED_CROSS_ENTROPY, *direct, TRL_SELECTIVE, FLASH)
    cases = [
        Case("token_log_probs", rows, "bfloat16", FORWARD, torchs, {LIMIT: 1 / 0.92}),
        Case("token_log_probs", rows, "bfloat16", BACKWARD, torchs, {LIMIT: 1 / 0.92}),
        # Liger's makes the gradient in the forward, over the logits: only the two together can be compared.
        Case("token_log_probs", rows, "bfloat16", BOTH, (*torchs, LIGER), dict.fromkeys((*torchs, LIGER), 1.0)),
    ]
    memory = (4 * head["N"] * head["H"] + 0.03 * _bytes(head, "bfloat16")) / 2**20
    faster = dict.fromkeys((LIGER_LINEAR, CCE, TRL_CHUNKED), 1.0)
    for operator in ("linear_token_log_probs", "linear_cross_entropy"):
        cases.append(Case(operator, head, "bfloat16", BOTH, (*faster, UNFUSED), {**faster, LIMIT: 1.15}, memory))
    scans = (ROW_KERNEL, SCAN)
    goals = {LIMIT: 1 / 0.85, TRL_LOOP: 500.0, ROW_KERNEL: 1.0, SCAN: 1.0}
    cases += [
        Case("gae", {"B": 4096, "T": 2048}, "float32", FORWARD, (TRL_LOOP, VERL_LOOP, *scans), goals),
        Case("gae", {"B": 64, "T": 32768}, "float32", FORWARD, (TRL_LOOP, *scans), goals),
        Case("gae", {"B": 256, "T": 128}, "float32", FORWARD, (TRL_LOOP, COMPILED_LOOP, *scans)),
    ]
    for operator in ("clipped_policy_loss", "clipped_value_loss"):
        for passes in (FORWARD, BACKWARD):
            goals = {LIMIT: 1 / 0.9, EAGER: 1.0, COMPILED: 1.0}
            cases.append(Case(operator, {"N": 2**20}, "float32", passes, (EAGER, COMPILED), goals))
    return cases + _sampling(256, 128256, "bfloat16")


def sweeps(device: str) -> list[Case]:
    """The points of the plots: time and memory against N, V and T, one size varied at a time."""
    if device == "cpu":
        dtype, hidden, rows, columns = "float32", 576, (128, 256, 512, 1024), (4096, 16384, 49152, 131072)
        middle, lengths, batch = {"N": 256, "V": 49152}, (128, 512, 2048, 8192), 256
    else:
        dtype, hidden, rows, columns = "bfloat16", 4096, (1024, 4096, 16384), (16384, 65536, 262144)
        middle, lengths, batch = {"N": 4096, "V": 128256}, (128, 512, 2048, 8192), 1024
    cases = []
    for size in ("N", "V"):
        for value in rows if size == "N" else columns:
            shape = {**middle, size: value}
            cases.append(Case("token_log_probs", shape, dtype, BOTH, (CROSS_ENTROPY, TRL_SELECTIVE)))
            shape = {"N": shape["N"], "H": hidden, "V": shape["V"]}
            cases.append(Case("linear_token_log_probs", shape, dtype, BOTH, (UNFUSED, TRL_CHUNKED)))
    cases += [Case("gae", {"B": batch, "T": length}, "float32", FORWARD, (TRL_LOOP,)) for length in lengths]
    return [case for number, case in enumerate(cases) if case not in cases[:number]]  # the middle is on both lines


def alone(cases: list[Case]) -> list[Case]:
    """The same rows without peers and the goals against them."""
    limits = [{name: goal for name, goal in case.goals.items() if name == LIMIT} for case in cases]
    return [replace(case, peers=(), goals=goals) for case, goals in zip(cases, limits, strict=True)]


def quick(cases: list[Case]) -> list[Case]:
    """The same rows at a 64th of each size, without what must be compiled: does the benchmark itself work?"""
    small = []
    for case in cases:
        shape = {name: size if name in FILTERS else max(2, size // 64) for name, size in case.shape.items()}
        peers = tuple(name for name in case.peers if name not in COMPILES)
        small.append(replace(case, shape=shape, peers=peers, memory_goal=None))
    return small


# The limit of the machine


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
