"""Masked means and whitening against numbers worked by hand, and the properties that define them."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlhf_lightning.algorithms.masked import masked_mean, masked_variance, whiten

NAN = float("nan")


def test_masked_mean_ignores_what_is_not_counted_even_nan():
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)


def test_nothing_counted_is_zero_and_not_nan():
    x, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(x, mask).item() == 0.0
    assert masked_variance(x, mask).item() == 0.0
    assert torch.equal(whiten(x, mask), torch.zeros(2, 3))


def test_whitening_by_hand():
    # Counted: 1, 2, 3, 6. Mean 3, biased variance (4 + 1 + 0 + 9) / 4 = 3.5.
    x = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    scale = 1 / math.sqrt(3.5)
    expected = torch.tensor([[-2 * scale, -1 * scale, 0.0], [0.0, 3 * scale, 0.0]])
    torch.testing.assert_close(whiten(x, mask), expected)
    torch.testing.assert_close(whiten(x, mask, keep_mean=True), expected + 3.0 * mask)


def test_whitened_entries_have_mean_zero_and_variance_one():
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) * 5 + 3
    mask = torch.rand(64, 33, generator=torch.Generator().manual_seed(1)) < 0.7
    counted = whiten(x, mask)[mask].double()
    assert abs(counted.mean().item()) < 1e-6
    assert counted.var(correction=0).item() == pytest.approx(1.0, abs=1e-6)


def test_constant_entries_whiten_to_zero():
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(whiten(torch.full((3, 4), 7.0), mask), torch.zeros(3, 4))


def test_the_split_over_processes_does_not_change_the_result():
    x = torch.randn(10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(10, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    barrier = threading.Barrier(2)
    sent: dict[int, torch.Tensor] = {}

    def process(index: int, rows: slice) -> torch.Tensor:
        def reduce(sums: torch.Tensor) -> torch.Tensor:
            sent[index] = sums
            barrier.wait(timeout=10)
            total = sent[0] + sent[1]
            barrier.wait(timeout=10)  # nobody overwrites what the other has yet to read
            return total

        return whiten(x[rows], mask[rows], reduce)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(process, (0, 1), (slice(0, 3), slice(3, 10))))
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask))
