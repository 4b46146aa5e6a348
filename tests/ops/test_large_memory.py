"""Large results: their memory is kept when they are freed, and never given to two at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ops.support import needs_native

from rlhf_lightning.ops.extension import keep_memory

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


@pytest.fixture
def kept():
    keep_memory(True)
    yield
    keep_memory(False)


def test_any_large_tensor_is_kept_while_that_is_on(kept: None):
    first = torch.zeros(1 << 20)
    address = first.data_ptr()
    assert address % (1 << 21) == 0
    del first
    again = torch.zeros(1 << 20)  # what was in the block is gone
    assert again.data_ptr() == address and not again.any()
    assert torch.zeros(1 << 10).data_ptr() % (1 << 21) != 0


def test_tensors_outlive_it_and_grow(kept: None):
    x = torch.ones(1 << 20)
    keep_memory(False)
    later = [torch.zeros(1 << 20) for _ in range(4)]
    assert all(y.data_ptr() != x.data_ptr() for y in later) and bool((x == 1).all())
    x.resize_(3 << 20)
    assert bool((x[: 1 << 20] == 1).all())
    x.share_memory_()
    assert bool((x[: 1 << 20] == 1).all())


def test_memory_that_is_freed_by_its_address_alone(kept: None):
    # oneDNN holds the packed weight, and frees it when keeping has long been off.
    weight, x = torch.randn(2048, 1024), torch.randn(8, 1024)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    keep_memory(False)
    before = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    keep_memory(True)
    for one in (packed, before):
        out = torch.ops.mkldnn._linear_pointwise(x, one, None, "none", [], "")
        assert torch.allclose(out, x @ weight.T, rtol=1e-5, atol=1e-3)
    del one, packed, before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_kept_has_a_bound_and_is_given_back(kept: None):
    before = resident()
    tensors = [torch.ones(16 << 20) for _ in range(12)]  # 64 MiB each
    assert 700 << 20 < resident() - before < 800 << 20
    tensors.clear()
    again = [torch.ones(16 << 20) for _ in range(12)]
    assert resident() - before < 800 << 20
    again.clear()
    others = [torch.ones(5 << 20) for _ in range(24)]  # 20 MiB each, which a block of 64 is too large for
    assert resident() - before < 800 << 20
    others.clear()
    keep_memory(False)
    assert resident() - before < 40 << 20


def test_a_step_takes_the_pages_of_the_last_one(kept: None):
    def step() -> int:
        """Page faults of a step that holds many tensors at once, as a training does its activations."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(size << 18) for size in range(4, 44)]  # 4 to 43 MiB, 940 in all
        del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

    first = step()
    assert first > 400  # of huge pages
    assert step() < first / 10


FORKS = """
import os, sys, threading, time
import torch
from rlhf_lightning.ops.extension import keep_memory

torch.set_num_threads(1)
keep_memory(True)
keep_memory(sys.argv[1] == "on")
ended = False

def work():
    while not ended:
        x, y = torch.empty(1 << 20), torch.empty(1 << 19)
        del x, y

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
hung = 0
for _ in range(150):
    child = os.fork()
    if child == 0:
        x = torch.empty(1 << 20)
        del x
        keep_memory(False)
        os._exit(0)
    end = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            hung += 1
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    if hung:
        break
ended = True
print(hung)
"""


@pytest.mark.parametrize("keeping", ["on", "off"])
def test_a_child_of_a_fork_never_waits_for_a_lock_of_the_parents_threads(keeping: str):
    done = subprocess.run([sys.executable, "-c", FORKS, keeping], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "0", done.stdout + done.stderr


def test_without_keeping_little_is_kept():
    before = resident()
    results = [gradient(1.0, 4 * ROWS) for _ in range(12)]  # 64 MiB each
    results.clear()
    assert resident() - before < 300 << 20


SHORT_OF_ADDRESSES = """
import resource
import torch
from ops.test_large_memory import VOCABULARY, holds

op = torch.ops.rlhf_lightning
rows = 24 << 6  # 384 MiB
logits, tokens = torch.zeros(rows, VOCABULARY), torch.zeros(rows, dtype=torch.int64)
_, *saved = op.token_log_probs(logits, tokens, 1.0)


def gradient(value, rows):
    ones, few = torch.full((rows,), value), [x[:rows] for x in saved]
    return op.token_log_probs_backward(ones, torch.zeros(rows), logits[:rows], tokens[:rows], *few, 1.0)


kept = gradient(1.0, 16 << 6)  # 256 MiB
del kept
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (192 << 20), before[1]))
try:
    torch.empty(rows, VOCABULARY)
except RuntimeError:
    print("torch has no room")
wanted = gradient(2.0, rows)
resource.setrlimit(resource.RLIMIT_AS, before)
assert holds(wanted, 2.0)
"""


def test_the_kept_memory_makes_room_where_the_system_has_no_more():
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_ADDRESSES], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "torch has no room\n"
