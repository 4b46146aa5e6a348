"""The CUDA kernel of sample_tokens, run on the CPU by the emulator, against the oracle of test_sample_tokens."""

from __future__ import annotations

import math

import pytest
import torch
from ops.cuda_emulation import LaunchError, emulated, guarded
from ops.support import randn, result_dtype
from ops.test_sample_tokens import OPTIONS, check_a_draw_of_one, check_row, uniform_draws

EXPORTS = r"""
extern "C" int run_sample(
    const void* logits, int64_t type, int64_t rows, int64_t columns, int64_t stride, const double* draws,
    double temperature, int64_t top_k, double top_p, int64_t* tokens, void* log_probs, void* entropy) {
  using namespace rlhf_lightning;
  const auto element = static_cast<Element>(type);
  const SampleArrays arrays{logits, element, rows, columns, stride, draws, tokens, log_probs, entropy};
  return launch_sample_tokens(arrays, temperature, top_k, top_p, nullptr);
}
"""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

cuda = emulated("sample_tokens.cu", EXPORTS)


@pytest.fixture
def sample(cuda):
    """The kernel as a function like sample_tokens; ``seed`` draws the order in which its threads run."""

    def run(logits, draws, temperature=1.0, top_k=0, top_p=1.0, seed=0, at_end=True, offset=0):
        rows, columns = logits.shape
        stride = logits.stride(0)
        data = guarded(logits[:1].contiguous() if stride == 0 else logits.contiguous(), at_end, offset)
        result = result_dtype(logits.dtype)
        outputs = [guarded(torch.zeros(rows, dtype=d)) for d in (torch.int64, result, result)]
        stride = 0 if stride == 0 else columns
        cuda.run(
            "run_sample", data, TYPES[logits.dtype], rows, columns, stride, guarded(draws), float(temperature),
            top_k, float(top_p), *outputs, seed=seed,
        )  # fmt: skip
        return tuple(x.clone() for x in outputs)

    return run


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_by_the_oracle(sample, options):
    for number, (vocabulary, dtype) in enumerate(
        [(1, torch.float32), (7, torch.float64), (129, torch.bfloat16), (1000, torch.float16), (4500, torch.float32)]
    ):
        row = randn(vocabulary, dtype=dtype, seed=number, scale=3.0)
        row[1::6] = -torch.inf
        check_row(row, uniform_draws(6), sample, 0.8, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ties(sample, dtype):
    """At the k-th place all stay; at the edge of the nucleus the first do."""
    row = torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0, 1.0, -1.0, 0.0], dtype=dtype)
    draws = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    for options, kept in (
        ({"top_k": 2}, {1, 3, 5}),
        ({"top_k": 4}, {0, 1, 2, 3, 4, 5, 7}),
        ({"top_p": 0.3}, {1, 3}),
        ({"top_p": 0.75}, {0, 1, 2, 3, 5}),
        ({"temperature": 0.0}, {1}),
    ):
        tokens, _, _ = sample(row.expand(16, -1), draws, **options)
        assert set(tokens.tolist()) == kept
    tokens, log_probs, _ = sample(
        torch.zeros(1, 5000, dtype=dtype), torch.tensor([1 - 2**-53], dtype=torch.float64), top_p=0.1
    )
    assert tokens.item() == 499 and log_probs.item() == pytest.approx(-math.log(500), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.7}], ids=str)
def test_a_draw_of_one(sample, dtype, options):
    check_a_draw_of_one(sample, dtype, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_rows_without_a_distribution_and_impossible_tokens(sample, options):
    bad = [[-torch.inf] * 50, [torch.inf] + [0.0] * 49, [0.0] * 33 + [torch.nan] + [0.0] * 16]
    tokens, log_probs, entropy = sample(torch.tensor(bad), uniform_draws(3), **options)
    assert ((tokens >= 0) & (tokens < 50)).all() and log_probs.isnan().all() and entropy.isnan().all()
    long = torch.full((6000,), -torch.inf)  # most warps have nothing to draw from
    long[[2501, 2503]] = 0.0
    draws = torch.tensor([2**-53, 0.3, 1 - 2**-53], dtype=torch.float64)
    tokens, log_probs, _ = sample(long.expand(3, -1), draws, **options)
    assert set(tokens.tolist()) <= {2501, 2503} and log_probs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_the_same_bits_at_any_address_and_in_any_order_of_threads(sample, dtype, options):
    logits, draws = randn(2, 1033, dtype=dtype), uniform_draws(2)
    first = sample(logits, draws, **options)
    for change in ({"seed": 1}, {"at_end": False, "offset": 1}):
        again = sample(logits, draws, **options, **change)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = sample(logits[1:], draws[1:], **options)
    assert all(torch.equal(a[1:], b) for a, b in zip(first, alone, strict=True))


def test_vectors_and_single_elements_give_the_same_bits(sample):
    logits, draws = randn(2, 1024), uniform_draws(2)
    by_vector = sample(logits, draws, 0.9)
    one_by_one = sample(logits, draws, 0.9, at_end=False, offset=1)
    assert all(torch.equal(a, b) for a, b in zip(by_vector, one_by_one, strict=True))


@pytest.mark.parametrize("rows", [2**31, 2**32 + 3])
def test_more_rows_than_a_grid_has_blocks_are_refused(cuda, rows):
    logits, draws, tokens = guarded(randn(1, 9)), guarded(uniform_draws(3)), guarded(torch.full((3,), -1))
    results = [guarded(torch.zeros(3)) for _ in range(2)]
    with pytest.raises(LaunchError, match="error 9"):
        cuda.run("run_sample", logits, 0, rows, 9, 0, draws, 1.0, 0, 1.0, tokens, *results)
    assert (tokens == -1).all()
