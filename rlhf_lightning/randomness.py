"""Counter-based random numbers: a draw depends on where it is used, and not on the number of draws before it.

There is no generator state. So the number of processes, batching, the order of rows, or a resume cannot change a draw,
and a checkpoint has no random state to restore.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Salts separate the streams of different uses. Their values only have to differ.
SAMPLING = 1
MINIBATCHES = 2
DATA_ORDER = 3
CANDIDATES = 4
ANNOTATION = 5
CANDIDATE_ORDER = 6


def uniform(seed: int, stream: int, *counters: int | Tensor) -> Tensor:
    """Uniform draws in the open interval (0, 1), float64, one for each element of the broadcast counters.

    Args:
        seed: the run's seed.
        stream: one of this module's salts.
        counters: ints or int64 tensors that broadcast together, e.g. iteration, rows ``[B]``, token position.

    The splitmix64 finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") mixes in the
    counters one after the other. The top 52 bits, plus a half, make the float, so 0 and 1 never occur.
    """
    device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    state = torch.tensor(seed, dtype=torch.int64, device=device)
    for counter in (stream, *counters):
        state = _mix(state + _GOLDEN + _mix(torch.as_tensor(counter, dtype=torch.int64, device=device)))
    return (_shift_right(state, 12).to(torch.float64) + 0.5) * 2.0**-52


def permutation(size: int, seed: int, stream: int, *counters: int) -> Tensor:
    """A permutation of ``range(size)`` as an int64 tensor ``[size]``, a pure function of its arguments."""
    return torch.argsort(uniform(seed, stream, *counters, torch.arange(size)), stable=True)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic. The mixer needs logical ones, so the copies of the sign bit are cleared.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)
