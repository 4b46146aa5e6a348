"""The error against float64 is no larger than torch's own at that dtype.

benchmarks/numerics.py is the study at full size; this holds its claim at small ones. Errors are
relative to the largest true value of each result; the slack is that of the table of tolerances.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops.support import needs_native, randint, randn, result_dtype, with_threads
from tolerances import assert_error_within

from rlhf_lightning import ops
from rlhf_lightning.ops import clipped_policy_loss, clipped_value_loss, gae

pytestmark = needs_native

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, VOCABULARY = 12, 4099


def assert_no_worse(actual, torchs, truth, dtype):
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].double(), truth[~finite])
    scale = truth[finite].abs().max().clamp_min(1e-30)
    actual, torchs, truth = (x[finite].double() / scale for x in (actual, torchs, truth))
    assert_error_within(actual, torchs, truth, dtype)


def logits_of(kind):
    normal = randn(ROWS, VOCABULARY, dtype=torch.float64)
    if kind == "offset":
        return 3 * normal + 1000
    if kind == "dominant":
        return torch.cat([normal[:, :-1], normal[:, -1:] + 40], 1)
    if kind == "huge":
        return 1e4 * normal
    if kind == "gigantic":
        return 1e30 * normal
    logits = 3 * normal
    masked = {"plain": 0, "one impossible": 1, "few possible": VOCABULARY - 8}[kind]
    logits[:, :masked] = -math.inf
    return logits


def softmax_results(logits, tokens, temperature, kind):
    """log_probs, entropy and the gradients of their sums: log_softmax in ``kind``, autograd where it has no NaN."""
    logits = logits.detach().requires_grad_()
    table = (logits.to(kind) / temperature).log_softmax(-1)
    log_probs = table.gather(-1, tokens[:, None])[:, 0]
    (by_log_probs,) = torch.autograd.grad(log_probs.sum(), logits)
    table = table.detach()
    terms = torch.where(table.exp() > 0, table.exp() * table, 0.0)
    entropy = -terms.sum(-1)
    by_entropy = -torch.where(table.exp() > 0, table.exp() * (table + entropy[:, None]), 0.0) / temperature
    return log_probs.detach(), entropy, by_log_probs, by_entropy.to(logits.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "temperature"),
    [("plain", t) for t in (0.1, 1.0, 10.0)]
    + [(kind, 1.0) for kind in ("offset", "dominant", "huge", "gigantic", "one impossible", "few possible")],
)
def test_token_log_probs(device, dtype, kind, temperature):
    limit = torch.finfo(dtype).max
    logits = torch.where(logits_of(kind).isinf(), -math.inf, logits_of(kind).clamp(-limit, limit)).to(dtype).to(device)
    tokens = (VOCABULARY - 1 - randint(8, ROWS)).to(device)
    learned = logits.clone().requires_grad_()
    log_probs, entropy = ops.token_log_probs(learned, tokens, temperature)
    (by_log_probs,) = torch.autograd.grad(log_probs.sum(), learned, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), learned)
    ours = log_probs.detach(), entropy.detach(), by_log_probs, by_entropy
    torchs = softmax_results(logits, tokens, temperature, torch.float32)
    truth = softmax_results(logits.double(), tokens, temperature, torch.float64)
    for i, results in enumerate(zip(ours, torchs, truth, strict=True)):
        assert_no_worse(*results, torch.float32 if i < 2 else dtype)


def head_results(hidden, weight, tokens, kind):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_probs = -F.cross_entropy((hidden @ weight.T).to(kind), tokens, reduction="none")
    return log_probs.detach(), *torch.autograd.grad(log_probs.sum(), (hidden, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(6, 20000), (3000, 50)])  # long sums for hidden, and for the weight
def test_the_fused_head(device, dtype, rows, vocabulary):
    hidden = randn(rows, 16, dtype=dtype).to(device).requires_grad_()
    weight = randn(vocabulary, 16, dtype=dtype, seed=1, scale=0.25).to(device).requires_grad_()
    tokens = randint(vocabulary, rows).to(device)
    log_probs, _ = ops.linear_token_log_probs(hidden, weight, tokens)
    ours = log_probs.detach(), *torch.autograd.grad(log_probs.sum(), (hidden, weight))
    torchs = head_results(hidden, weight, tokens, torch.float32)
    truth = head_results(hidden.double(), weight.double(), tokens, torch.float64)
    for results in zip(ours, torchs, truth, strict=True):
        assert_no_worse(*results, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(4096, 1024), (4096, 301), (20, 60001)])  # 4, 2 and 3 chunks
def test_a_sum_over_few_chunks_is_rounded_once(dtype, rows, vocabulary):
    """Rounded per chunk, its root mean square error was a third above torch's; odd sizes end in odd chunks."""
    hidden = randn(rows, 72, dtype=dtype).requires_grad_()
    weight = randn(vocabulary, 72, dtype=dtype, seed=1, scale=0.12)
    tokens = randint(vocabulary, rows)
    log_probs, _ = ops.linear_token_log_probs(hidden, weight, tokens)
    (ours,) = torch.autograd.grad(log_probs.sum(), hidden)
    _, torchs, _ = head_results(hidden, weight, tokens, torch.float32)
    _, truth, _ = head_results(hidden.double(), weight.double(), tokens, torch.float64)
    own, theirs = ((x.double() - truth).square().mean().sqrt() for x in (ours, torchs))
    assert own <= 1.05 * theirs


def loss_results(function, tensors, options):
    first = tensors[0].detach().requires_grad_()
    loss, clipped = function(first, *tensors[1:], *options)
    return loss.detach(), torch.autograd.grad(loss.sum(), first)[0], clipped


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "options"),
    [(clipped_policy_loss, (0.2, 0.28, 3.0)), (clipped_value_loss, (0.2,))],
    ids=["policy", "value"],
)
def test_the_clipped_losses(device, dtype, module, options):
    old = randn(5000)
    tensors = [x.to(dtype).to(device) for x in (old + 0.3 * randn(5000, seed=1), old, randn(5000, seed=2))]
    name = module.__name__.rpartition(".")[2]
    ours = loss_results(getattr(ops, name), tensors, options)
    torchs = loss_results(sys.modules[module.__module__].reference, tensors, options)
    truth = loss_results(sys.modules[module.__module__].reference, [x.double() for x in tensors], options)
    same = ours[2] == truth[2]  # an element at the edge of the clip may fall on its other side in float64
    assert same.float().mean() > 0.999
    for results, kind in zip(
        zip(ours[:2], torchs[:2], truth[:2], strict=True), (result_dtype(dtype), dtype), strict=True
    ):
        assert_no_worse(*(x[same] for x in results), kind)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gae(device, dtype):
    inputs = [randn(4, 900, dtype=dtype, seed=seed).to(device) for seed in (0, 1)]
    mask = (randn(4, 900, seed=2) > -1).to(device)
    reference = sys.modules[gae.__module__].reference
    results = (f(*x, mask, 0.999, 0.99) for f, x in ((gae, inputs), (reference, inputs)))
    truth = reference(*(x.double() for x in inputs), mask, 0.999, 0.99)
    for ours, torchs, exact in zip(*results, truth, strict=True):
        assert_no_worse(ours, torchs, exact, torch.float32)


def test_the_number_of_threads_changes_no_bit():
    """Elementwise operators, GAE and softmax rows at sizes that several threads share."""
    logits, tokens = randn(64, 3000), randint(3000, 64)
    first, second, third = randn(3, 150_000).unbind()
    rewards, values = randn(2, 70, 600).unbind()

    def everything():
        learned, free, kept = (x.clone().requires_grad_() for x in (logits, first, first))
        log_probs, entropy = ops.token_log_probs(learned, tokens)
        policy, _ = ops.clipped_policy_loss(free, second, third, 0.2, 0.2)
        value, _ = ops.clipped_value_loss(kept, second, third, 0.2)
        torch.autograd.backward(
            [log_probs, entropy, policy, value], [torch.ones_like(x) for x in (log_probs, entropy, policy, value)]
        )
        results = [log_probs, entropy, policy, value, learned.grad, free.grad, kept.grad]
        return results + list(ops.gae(rewards, values, rewards > -1, 0.99, 0.95))

    for one, two in zip(with_threads(1, everything), with_threads(2, everything), strict=True):
        assert torch.equal(one, two)


def test_the_study_runs(tmp_path):
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, root / "benchmarks" / "numerics.py", "--quick", "--json", tmp_path / "numerics.json"],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "numerics.json").read_text())
    assert {row["dtype"] for row in found["rows"]} == {"float32", "bfloat16", "float16"}
    assert done.stdout.count("\n| ") == len(found["rows"]) + 3  # a heading over each of the three tables
    assert all(math.isfinite(row["ours"]["rms"]) and row["ours"]["max"] >= 0 for row in found["rows"])
