"""The one table of numerical tolerances.

An operator's error against float64 may be no larger than PyTorch's own at that dtype, plus this slack; two float32
implementations may differ by it. Relative to the larger of 1 and the value.
Gradients of logits are far below 1 but at the row's token, so their size is asked about too.
"""

from __future__ import annotations

import torch
from torch import Tensor

# float32 and below: a few dozen units in the last place of the results' dtype; 16-bit gradients are rounded to 16 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """``actual`` equals ``expected`` to ``times * TOLERANCE[dtype]``; NaN equals NaN and an infinity itself."""
    slack = times * TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=slack, atol=slack, equal_nan=True)


def assert_error_within(actual: Tensor, torchs: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The largest error of ``actual`` against the float64 ``truth`` is at most that of ``torchs``, plus the slack."""
    scale = truth.double().abs().clamp_min(1.0)
    own = ((actual.double() - truth).abs() / scale).max()
    theirs = ((torchs.double() - truth).abs() / scale).max()
    assert own <= theirs + TOLERANCE[dtype], f"error {own:.3g}, torch's own {theirs:.3g}"


# Where digits are lost: below what float16 holds, and, in the wider ranges, where powers are flushed to 0: below 2^-126
# without AVX-512, and an element is its power times up to |log-prob| / temperature, 87 * 20 in the tests.
FLOOR = {torch.float64: 1e-300, torch.float32: 1e-34, torch.bfloat16: 1e-34, torch.float16: 6e-8}


def assert_gradient_near(actual: Tensor, truth: Tensor, terms: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """A gradient of logits in ``dtype`` is the float64 ``truth`` relative to each element, and to half that in L2.

    ``terms`` is what the roundings of the arithmetic, float32 where ``dtype`` is of 16 bits, may grow with where an
    element is a difference: see ``gpu.oracles.gradient_terms``. ``times`` is for these roundings.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    error, size, of_terms = (actual.double() - truth).abs(), truth.abs(), times * TOLERANCE[wide] * terms
    allowed = TOLERANCE[dtype] * size + of_terms + FLOOR[dtype]
    worst = (error / allowed).max()  # NaN if any is
    assert worst <= 1, f"the worst element's error is {worst:.3g} times what is allowed"
    whole = 0.5 * TOLERANCE[dtype] * size.norm() + of_terms.norm() + FLOOR[dtype] * size.numel() ** 0.5
    assert error.norm() <= whole, f"relative L2 error {error.norm() / size.norm():.3g}"
