"""token_log_probs on logits of more than 2^31 elements, where a 32-bit offset would wrap."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from ops.support import needs_native, randint, randn
from tolerances import TOLERANCE

from rlhf_lightning.ops.token_log_probs import token_log_probs

VOCABULARY = 1 << 17
ROWS = (1 << 14) + 3  # the last rows lie past 2^31 elements
GIB = 1 << 30
NEEDED, ENOUGH = 10 * GIB, 20 * GIB


def release_kept_memory():
    importlib.import_module("rlhf_lightning._C").release_kept_memory()


@pytest.fixture
def logits():
    """``[ROWS, VOCABULARY]`` bf16, 4.3 GB: one row of random numbers over and over."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    if total < ENOUGH and free < NEEDED:
        pytest.skip(f"needs {NEEDED / GIB:.0f} GiB of memory, {free / GIB:.1f} are free of {total / GIB:.1f}")
    return randn(VOCABULARY, scale=2.0).bfloat16().repeat(ROWS, 1)


@needs_native
def test_rows_past_2_31_elements_and_one_row_of_as_many(logits):
    base, every = logits[0].double(), torch.arange(ROWS)
    tokens, marks = randint(VOCABULARY, ROWS), torch.linspace(4, 12, ROWS).bfloat16()
    logits[every, tokens] = marks  # so a row read or written in another's place gives other results
    # Of the row that all share, with its token's logit taken out and the mark put in, in float64.
    power, marked = base.exp(), marks.double()
    total = power.sum() - power[tokens] + marked.exp()
    weighted = (power * base).sum() - (power * base)[tokens] + marked.exp() * marked
    log_p, entropy = marked - total.log(), total.log() - weighted / total

    incoming, spread = randn(ROWS, seed=1), randn(ROWS, seed=2)
    got = token_log_probs(logits.requires_grad_(), tokens)
    for found, true in zip(got, (log_p, entropy), strict=True):
        torch.testing.assert_close(found.detach().double(), true, rtol=3e-6, atol=3e-6)
    (grad,) = torch.autograd.grad(got, logits, (incoming, spread))

    def slope(p, chosen, rows):
        by_entropy = p * (p.log() + entropy[rows])
        return incoming[rows].double() * (chosen - p) - spread[rows].double() * by_entropy

    def assert_near(found, true):
        torch.testing.assert_close(found.double(), true, rtol=TOLERANCE[torch.bfloat16], atol=1e-9)

    other = (tokens + 1 + randint(VOCABULARY - 1, ROWS, seed=3)) % VOCABULARY
    assert_near(grad[every, tokens], slope(log_p.exp(), 1.0, every))
    assert_near(grad[every, other], slope(power[other] / total, 0.0, every))
    for row in (0, (1 << 14) - 1, 1 << 14, ROWS - 1):  # whole rows, on both sides of 2^31
        true = slope(power / total[row], 0.0, torch.tensor(row))
        true[tokens[row]] = slope(log_p.exp()[row], 1.0, torch.tensor(row))
        assert_near(grad[row], true)
    del grad
    release_kept_memory()

    # All of it as one row: a token's offset within the row passes 2^31 too.
    total, weighted = total.sum(), weighted.sum()
    place = torch.tensor([(ROWS - 1) * VOCABULARY + int(tokens[-1])])
    with torch.no_grad():
        log_probs, spreads = token_log_probs(logits.detach().view(1, -1), place)
    torch.testing.assert_close(log_probs[0].double(), marked[-1] - total.log(), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(spreads[0].double(), total.log() - weighted / total, rtol=3e-6, atol=3e-6)
