"""sample_tokens against an oracle that sorts and sums in Python floats, and against the distribution it draws from."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.support import FLOATS, needs_compiler, needs_native, randn, result_dtype, with_threads
from tolerances import assert_near

from rlhf_lightning.ops.sample_tokens import reference, sample_tokens

IMPLEMENTATIONS = [pytest.param(sample_tokens, id="dispatched"), pytest.param(reference, id="reference")]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.999, "temperature": 1.3},
    {"top_p": 1e-9},
    {"top_k": 20, "top_p": 0.8, "temperature": 2.0},
    {"top_k": 10**9, "top_p": 0.9},
]
ROUNDING = 1e-5  # how far a draw, or top_p, must be from a boundary for the result not to depend on rounding


def oracle(row, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities [V] of one row after temperature and filters, and how near top_p is to changing them."""
    scaled = [x if temperature == 0 else x / temperature for x in row.double().tolist()]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])  # stable: of equal logits the first index
    if 0 < top_k < len(order):
        order = [i for i in order if scaled[i] >= scaled[order[top_k - 1]]]
    mass = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total = math.fsum(mass.values())
    before, kept, near = 0.0, [], 1.0
    for i in order:
        near = min(near, abs(before - top_p)) if top_p < 1 and before > 0 else near
        if top_p < 1 and before >= top_p:
            break
        kept.append(i)
        before += mass[i] / total
    total = math.fsum(mass[i] for i in kept)
    probabilities = torch.zeros(len(scaled), dtype=torch.float64)
    for i in kept:
        probabilities[i] = mass[i] / total
    return probabilities, near


def uniform_draws(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp_min(2.0**-53)


def check_row(row, draws, function, minimum=0.99, **options):
    """Many draws from one row: tokens by the oracle's cumulative sums, log-probs and entropy by its probabilities."""
    probabilities, near = oracle(row, **options)
    if near < ROUNDING:
        return
    tokens, log_probs, entropy = function(row.expand(len(draws), -1), draws, **options)
    assert tokens.dtype == torch.int64 and log_probs.dtype == entropy.dtype == result_dtype(row.dtype)
    if options.get("temperature") == 0:
        assert (tokens == int(row.float().argmax())).all()
    else:
        after = probabilities.cumsum(0)
        rounding = 1e-12 if row.dtype == torch.float64 else 2e-7 * math.sqrt(len(row))
        clear = (draws[:, None] - after).abs().min(dim=1).values > rounding
        assert clear.double().mean() >= minimum
        expected = torch.searchsorted(after, draws, right=True)
        assert torch.equal(tokens[clear], expected[clear])
    assert (probabilities[tokens] > 0).all()
    times = 1 if row.dtype == torch.float64 else 2
    assert_near(log_probs, probabilities[tokens].log(), result_dtype(row.dtype), times)
    assert_near(entropy, torch.special.entr(probabilities).sum().expand(len(draws)), result_dtype(row.dtype), times)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_by_the_oracle(function, options):
    for number, vocabulary in enumerate([1, 2, 7, 129, 1000, 5000]):
        for dtype in FLOATS:
            row = randn(vocabulary, dtype=dtype, seed=number, scale=3.0)
            row[1::6] = -torch.inf
            minimum = 0.95 if vocabulary >= 1000 else 0.99
            check_row(row, uniform_draws(300), function, minimum, **options)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_filters_by_hand(function):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def shares(**options):
        tokens, _, _ = function(logits.expand(1000, -1), draws, **options)
        return torch.bincount(tokens, minlength=4) / 1000

    for options, expected in (
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.05}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ):
        torch.testing.assert_close(shares(**options), torch.tensor(expected, dtype=torch.float32), atol=1e-3, rtol=0)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties(function, dtype):
    """At the k-th place all stay; at the edge of the nucleus the first do."""
    row = torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0, 1.0, -1.0, 0.0], dtype=dtype)
    draws = uniform_draws(400)
    for options, kept in (
        ({"top_k": 2}, {1, 3, 5}),
        ({"top_k": 4}, {0, 1, 2, 3, 4, 5, 7}),
        ({"top_p": 0.3}, {1, 3}),  # each 1 has 0.213 of the mass, each 0 has 0.078
        ({"top_p": 0.7}, {0, 1, 3, 5}),
        ({"top_p": 0.75}, {0, 1, 2, 3, 5}),
        ({"top_k": 4, "top_p": 0.99}, {0, 1, 2, 3, 4, 5, 7}),
        ({"temperature": 0.0}, {1}),
    ):
        tokens, _, _ = function(row.expand(400, -1), draws, **options)
        assert set(tokens.tolist()) == kept
    same = torch.zeros(400, 5000, dtype=dtype)
    tokens, log_probs, _ = function(same, draws, top_p=0.1)
    assert tokens.max() < 500
    assert_near(log_probs, torch.full_like(log_probs, -math.log(500)), result_dtype(dtype))


@settings(max_examples=80)
@given(
    vocabulary=st.integers(1, 400),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 500),
    top_p=st.floats(0.01, 1.0),
    levels=st.sampled_from([3, 50, 10**6]),
    seed=st.integers(0, 2**40),
)
def test_properties(vocabulary, temperature, top_k, top_p, levels, seed):
    """Rows with few and with many distinct logits."""
    row = (randn(vocabulary, dtype=torch.float64, seed=seed, scale=2.0) * levels).round() / levels
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_row(row, uniform_draws(50, seed), sample_tokens, **options)
    check_row(row.float(), uniform_draws(50, seed), sample_tokens, 0.9, **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}], ids=str)
def test_draws_follow_the_distribution(options):
    row, count = randn(200, scale=1.5), 50_000
    tokens, _, _ = sample_tokens(row.expand(count, -1), uniform_draws(count), 0.9, **options)
    expected = oracle(row, 0.9, **options)[0] * count
    counts = torch.bincount(tokens, minlength=200).double()
    assert (counts[expected == 0] == 0).all()
    often = expected >= 5  # where the chi-square approximation holds; the rest goes into one cell
    cells, seen = (torch.cat([x[often], x[~often].sum()[None] + 1e-9]) for x in (expected, counts))
    freedom = int(often.sum())
    statistic = ((seen - cells) ** 2 / cells).sum().item()
    # Wilson and Hilferty 1931: the 99.9% point of chi-square.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@needs_native
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.95}], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_large_vocabulary_differs_from_the_reference_by_rounding_alone(options, scale):
    logits, draws = randn(64, 49152, scale=scale), uniform_draws(64)
    (tokens, log_probs, entropy), expected = (f(logits, draws, **options) for f in (sample_tokens, reference))
    # The chance that rounding moves a draw across a boundary is the sum of the boundaries' errors: about V * 1e-8.
    same = tokens == expected[0]
    assert same.sum() >= 63
    assert_near(log_probs[same], expected[1][same], torch.float32, 2)
    assert_near(entropy, expected[2], torch.float32, 2)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_a_token_of_probability_zero_is_never_drawn(function):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    draws = torch.cat([torch.linspace(1e-12, 1 - 1e-12, 1001, dtype=torch.float64), torch.tensor([2**-53, 1 - 2**-53])])
    long = torch.full((3 * 2048,), -torch.inf)  # whole parts of the row without a token
    long[2500:2505] = logits
    for row, possible in ((logits, {1, 3}), (long, {2501, 2503})):
        for options in ({}, {"top_k": 3}, {"top_p": 0.99}):
            tokens, log_probs, _ = function(row.expand(len(draws), -1), draws, **options)
            assert set(tokens.tolist()) == possible
            assert torch.isfinite(log_probs).all()


def check_a_draw_of_one(function, dtype, **options):
    """No cumulative probability is above it: the last token that has one, in a row whose end has none."""
    row = randn(5000, dtype=dtype)
    row[4700:] = -torch.inf
    probabilities, _ = oracle(row, **options)
    last = int(probabilities.nonzero().max())
    tokens, log_probs, _ = function(row.expand(2, -1), torch.tensor([1.0, 0.5], dtype=torch.float64), **options)
    assert tokens[0] == last and tokens[1] < last
    assert_near(log_probs[:1], probabilities[last].log()[None], result_dtype(dtype), 2)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.7}], ids=str)
def test_a_draw_of_one(function, dtype, options):
    check_a_draw_of_one(function, dtype, **options)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("bad", [[-torch.inf] * 50, [torch.inf] + [0.0] * 49, [0.0] * 33 + [torch.nan] + [0.0] * 16])
def test_a_row_without_a_distribution_is_nan_and_alone(function, options, bad):
    good = randn(1, 50)
    logits, draws = torch.cat([good, torch.tensor([bad]), good]), torch.tensor([0.3, 0.3, 0.3]).double()
    tokens, log_probs, entropy = function(logits, draws, **options)
    assert 0 <= tokens[1] < 50
    assert log_probs[1].isnan() and entropy[1].isnan()
    for result in (tokens, log_probs, entropy):
        assert result[0].isfinite() and result[0] == result[2]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_huge_logits_and_tiny_temperatures(function):
    logits, draws = torch.tensor([[3e38, -3e38, 3e38]]), torch.tensor([0.7], dtype=torch.float64)
    for temperature in (1.0, 1e-3, 1e-12):
        tokens, log_probs, entropy = function(logits, draws, temperature)
        assert tokens.item() == 2
        assert log_probs.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("options", [{}, {"top_k": 100}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_a_row_is_bitwise_the_same_alone_in_company_and_for_any_thread_count(options):
    logits, draws = randn(37, 5001), uniform_draws(37)
    whole = sample_tokens(logits, draws, **options)
    two = with_threads(2, lambda: sample_tokens(logits, draws, **options))
    alone = [sample_tokens(logits[i : i + 1], draws[i : i + 1], **options) for i in range(37)]
    for number, result in enumerate(whole):
        assert torch.equal(result, two[number])
        assert torch.equal(result, torch.cat([row[number] for row in alone]))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}], ids=str)
def test_strides(function, options):
    base, draws = randn(6, 2 * 33), uniform_draws(12)
    for logits, u in (
        (base[:, ::2], draws[::2]),
        (base[:, 33:], draws[:6]),
        (base[:, :6].t(), draws[:6]),
        (base[:1].expand(6, -1), draws[:6]),
    ):
        got, expected = function(logits, u, **options), function(logits.contiguous(), u.contiguous(), **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_no_rows(function, options):
    results = function(torch.empty(0, 9), torch.empty(0, dtype=torch.float64), **options)
    assert [x.shape for x in results] == [(0,)] * 3


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_no_gradient(function):
    logits = randn(2, 9).requires_grad_()
    assert not any(x.requires_grad for x in function(logits, uniform_draws(2)))


ERRORS = [
    (
        dict(logits=torch.zeros(2, 3, dtype=torch.int64)),
        TypeError,
        "sample_tokens: logits must be a float32, bfloat16, float16 or float64 tensor, got int64",
    ),
    (dict(draws=torch.zeros(2)), TypeError, "sample_tokens: draws must be a float64 tensor, got float32"),
    (
        dict(logits=torch.zeros(2, 0)),
        ValueError,
        "sample_tokens: logits must have shape [B, V] with 0 < V < 2^30, got shape [2, 0]",
    ),
    (
        dict(logits=torch.zeros(2, 3, 1)),
        ValueError,
        "sample_tokens: logits must have shape [B, V] with 0 < V < 2^30, got shape [2, 3, 1]",
    ),
    (
        dict(draws=torch.zeros(3, dtype=torch.float64)),
        ValueError,
        "sample_tokens: draws must have the shape of logits without its last dimension, [2], got shape [3]",
    ),
    (
        dict(draws=torch.zeros(2, dtype=torch.float64, device="meta")),
        ValueError,
        "sample_tokens: draws must be on the device of logits, cpu, got meta",
    ),
    (dict(temperature=-1.0), ValueError, "sample_tokens: temperature must be 0 or a number in [1e-12, 1e12], got -1"),
    (dict(top_k=-1), ValueError, "sample_tokens: top_k must be an integer, 0 or above, got -1"),
    (dict(top_k=1.5), TypeError, "sample_tokens: top_k must be an integer, 0 or above, got float"),
    (dict(top_p=0.0), ValueError, "sample_tokens: top_p must be a number in (0, 1], got 0.0"),
    (dict(top_p=1.5), ValueError, "sample_tokens: top_p must be a number in (0, 1], got 1.5"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[e[2][15:50] for e in ERRORS])
def test_wrong_arguments(change, kind, message):
    good = dict(logits=torch.zeros(2, 3), draws=torch.full((2,), 0.5, dtype=torch.float64))
    with pytest.raises(kind) as caught:
        sample_tokens(**{**good, **change})
    assert str(caught.value) == message


@needs_native
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (dict(draws=torch.zeros(2)), TypeError),
        (dict(draws=torch.zeros(1, dtype=torch.float64)), ValueError),
        (dict(logits=torch.zeros(2, 0)), ValueError),
        (dict(logits=torch.zeros(6)), ValueError),
        (dict(temperature=math.nan), ValueError),
        (dict(top_k=-1), ValueError),
        (dict(top_p=math.nan), ValueError),
    ],
)
def test_the_native_operator_checks_for_itself(change, kind):
    good = dict(logits=torch.zeros(2, 3), draws=torch.full((2,), 0.5, dtype=torch.float64), temperature=1.0)
    with pytest.raises(kind, match="sample_tokens: "):
        torch.ops.rlhf_lightning.sample_tokens(**{**good, "top_k": 0, "top_p": 1.0, **change})


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    arguments = (randn(3, 9, dtype=dtype), uniform_draws(3), 0.9, 5, 0.9)
    torch.library.opcheck(torch.ops.rlhf_lightning.sample_tokens.default, arguments)


@needs_native
@needs_compiler
def test_compiles_whole():
    logits, draws = randn(3, 9), uniform_draws(3)
    compiled = torch.compile(lambda x: sample_tokens(x * 2, draws, 0.9), fullgraph=True)
    for got, expected in zip(compiled(logits), sample_tokens(logits * 2, draws, 0.9), strict=True):
        assert torch.equal(got, expected)


LOWER_CODE = """
import torch
from rlhf_lightning.ops import extension
from rlhf_lightning.ops.sample_tokens import reference, sample_tokens
assert extension.build_info()["cpu_instruction_set_in_use"] == "{name}", extension.build_info()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, u = (4 * torch.randn(40, 2503)).to(dtype), torch.rand(40, dtype=torch.float64)
    x[0, ::5] = -torch.inf
    for options in ({{}}, {{"temperature": 0.0}}, {{"top_k": 7}}, {{"top_p": 0.8, "temperature": 1.2}}):
        got, expected = (f(x, u, **options) for f in (sample_tokens, reference))
        assert torch.equal(got[0], expected[0])
        for a, b in zip(got[1:], expected[1:]):
            torch.testing.assert_close(a, b, rtol=6e-6, atol=6e-6)
"""


@needs_native
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_lower_instruction_sets(name):
    """ATEN_CPU_CAPABILITY lowers torch's kernels and these alike: what an older machine would run."""
    if name == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default" if name == "baseline" else name}
    subprocess.run([sys.executable, "-c", LOWER_CODE.format(name=name)], env=environment, check=True, timeout=120)
