"""Large results: their memory is kept when they are freed, and never given to two at once."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from ops.support import needs_native

pytestmark = [needs_native, pytest.mark.skipif(sys.platform != "linux", reason="kept on Linux only")]

ROWS, VOCABULARY = 64, 1 << 16  # 16 MiB, the smallest that is large


def gradient(value: float, rows: int = ROWS) -> torch.Tensor:
    """-value times the softmax of equal logits, but at token 0."""
    op = torch.ops.rlhf_lightning
    logits, tokens = torch.zeros(rows, VOCABULARY), torch.zeros(rows, dtype=torch.int64)
    _, *saved = op.token_log_probs(logits, tokens, 1.0)
    return op.token_log_probs_backward(torch.full((rows,), value), torch.zeros(rows), logits, tokens, *saved, 1.0)


def holds(x: torch.Tensor, value: float) -> bool:
    return torch.allclose(x[:, 1:], torch.tensor(-value / VOCABULARY), rtol=1e-5, atol=0)


def test_the_memory_of_a_freed_result_is_taken_by_the_next():
    first = gradient(1.0)
    address = first.data_ptr()
    assert address % (1 << 21) == 0
    del first
    second = gradient(2.0)
    assert second.data_ptr() == address and holds(second, 2.0)


def test_two_results_alive_do_not_share():
    results = [gradient(float(k)) for k in range(1, 6)]
    assert len({x.data_ptr() for x in results}) == 5
    assert all(holds(x, k) for k, x in enumerate(results, 1))
    view = results[0][:1]
    del results
    again = gradient(9.0)
    assert holds(view, 1.0) and holds(again, 9.0)  # a view keeps the whole


def test_a_smaller_result_fits_and_a_larger_one_does_not():
    large = gradient(1.0, 12 * ROWS)
    address = large.data_ptr()
    del large
    small = gradient(2.0, 8 * ROWS)
    assert small.data_ptr() == address and small.untyped_storage().nbytes() == small.nbytes
    del small
    larger = gradient(3.0, 12 * ROWS + 1)
    assert holds(larger, 3.0)


def test_it_can_be_resized():
    x = gradient(1.0)
    x.resize_(ROWS + 1, VOCABULARY)
    assert holds(x[:ROWS], 1.0)


def test_threads():
    failures = []

    def work(value: float) -> None:
        for _ in range(20):
            x = gradient(value)
            if not holds(x, value):
                failures.append(value)
            del x

    threads = [threading.Thread(target=work, args=(float(k),)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_profiler_sees_it():
    with torch.profiler.profile(profile_memory=True) as profile:
        x = gradient(1.0)
    assert max(e.self_cpu_memory_usage for e in profile.events()) >= x.nbytes
