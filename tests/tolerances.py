"""The one table of numerical tolerances.

An operator's error against float64 may be no larger than PyTorch's own at that dtype, plus this slack; two float32
implementations may differ by it. Relative to the larger of 1 and the value.
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
