"""The error against float64 is no larger than torch's own at that dtype.

Errors are relative to the largest true value of each result; the slack of the largest one is that of the table of
tolerances. At the sizes of a model's vocabulary (the slow tests) the root mean square error is held as well, which has
no slack but a tenth. torch is what people write: log_softmax and gather or F.cross_entropy of a float32 copy of the
logits, their gradients by autograd; for the fused head the matrix product first, in the dtype of the operands; for GAE
and the losses the formulas in eager torch.
"""

from __future__ import annotations

import math
import sys

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
LARGE = 32, 49152
MANY = 1 << 16  # results that are not 0: from here on their root mean square error is no accident


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def assert_no_worse(actual, torchs, truth, dtype):
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].double(), truth[~finite])
    scale = truth[finite].abs().max().clamp_min(1e-30)
    actual, torchs, truth = (x[finite].double() / scale for x in (actual, torchs, truth))
    assert_error_within(actual, torchs, truth, dtype)
    if truth.count_nonzero() >= MANY:
        own, theirs = ((x - truth).square().mean().sqrt() for x in (actual, torchs))
        assert own <= 1.1 * theirs, f"root mean square error {own:.3g}, torch's own {theirs:.3g}"


def test_a_worse_result_is_found():
    truth = randn(MANY, dtype=torch.float64)
    torchs = truth.float()
    assert_no_worse(torchs, torchs, truth, torch.float32)
    with pytest.raises(AssertionError, match=r"^error"):
        assert_no_worse(torch.cat([torchs[:-1], torchs[-1:] + 1e-3]), torchs, truth, torch.float32)
    with pytest.raises(AssertionError, match=r"^root mean square"):
        assert_no_worse((truth + 1.5 * (torchs - truth)), torchs, truth, torch.float32)
    with pytest.raises(AssertionError):
        assert_no_worse(torch.full_like(torchs, math.nan), torchs, truth, torch.float32)


def logits_of(kind, rows, vocabulary):
    normal = randn(rows, vocabulary, dtype=torch.float64)
    if kind == "offset":
        return 3 * normal + 1000
    if kind == "dominant":
        return torch.cat([normal[:, :-1], normal[:, -1:] + 40], 1)
    if kind == "huge":
        return 1e4 * normal
    if kind == "gigantic":
        return 1e30 * normal
    logits = 3 * normal
    masked = {"plain": 0, "one impossible": 1, "few possible": vocabulary - 8}[kind]
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
@pytest.mark.parametrize(("rows", "vocabulary"), [(ROWS, VOCABULARY), slow(*LARGE)])
def test_token_log_probs(device, dtype, kind, temperature, rows, vocabulary):
    limit, logits = torch.finfo(dtype).max, logits_of(kind, rows, vocabulary)
    logits = torch.where(logits.isinf(), -math.inf, logits.clamp(-limit, limit)).to(dtype).to(device)
    tokens = (vocabulary - 1 - randint(8, rows)).to(device)
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
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),  # long sums for hidden, and for the weight
    [
        (6, 20000, 16),
        (3000, 50, 16),
        slow(64, 4096, 256),
        slow(16, 32768, 256),
        slow(16, 262144, 64),
        slow(8192, 1024, 64),
    ],
)
def test_the_fused_head(device, dtype, rows, vocabulary, width):
    hidden = randn(rows, width, dtype=dtype).to(device).requires_grad_()
    weight = randn(vocabulary, width, dtype=dtype, seed=1, scale=width**-0.5).to(device).requires_grad_()
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
@pytest.mark.parametrize("size", [5000, slow(1 << 20)])
def test_the_clipped_losses(device, dtype, module, options, size):
    old = randn(size)
    tensors = [x.to(dtype).to(device) for x in (old + 0.3 * randn(size, seed=1), old, randn(size, seed=2))]
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
@pytest.mark.parametrize(("rows", "steps"), [(4, 900), slow(256, 1024), slow(4, 16384)])
def test_gae(device, dtype, rows, steps):
    inputs = [randn(rows, steps, dtype=dtype, seed=seed).to(device) for seed in (0, 1)]
    mask = (randn(rows, steps, seed=2) > -1).to(device)
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
