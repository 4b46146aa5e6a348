"""What is measured: operators, shapes, dtypes, passes, who takes part, and the goals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
HUGE_PAGES = {
    "THP_MEM_ALLOC_ENABLE": "1"
}  # torch's own variable: large CPU tensors are aligned, and advised to the kernel

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

FILTERS = ("top_k", "top_p")  # in the shape of a case, but no sizes
LIMIT = "limit"  # as an entrant, and in goals


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
