"""The CUDA kernels under token_log_probs and linear_token_log_probs, run on a CPU, against sums from the definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from gpu.oracles import gradient_terms
from ops.cuda_emulation import ROOT, LaunchError, emulated, guarded
from ops.support import FLOATS, randint, randn, result_dtype
from tolerances import assert_error_within, assert_gradient_near, assert_near

# What token_log_probs_cuda.cpp and linear_token_log_probs_cuda.cpp do between them: `width` columns at a time.
EXPORTS = r"""
using namespace rlhf_lightning;
extern "C" int run_forward(
    void* logits, int64_t type, int64_t offset, int64_t count, int64_t columns, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t width, const int64_t* tokens, double temperature, void* states, void* token_logits,
    void* log_probs, void* entropy, void* shift, void* log_sum) {
  const auto element = static_cast<Element>(type);
  const int64_t bytes = element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
  int64_t done = 0;
  for (int64_t first = 0; first < columns; first += width) {
    const int64_t some = std::min(width, columns - first);
    const LogitRows rows{static_cast<char*>(logits) + (offset + first) * bytes, element, count, some, first, inner,
                         outer_stride, inner_stride};
    void* here = static_cast<char*>(states) + done * count * softmax_state_bytes(element);
    const int error = softmax_statistics(rows, tokens, temperature, here, token_logits, nullptr);
    if (error != 0) return error;
    done += softmax_states(element, some);
  }
  return softmax_results(
      element, states, done, token_logits, tokens, columns, count, temperature, {log_probs, entropy, shift, log_sum},
      nullptr);
}
extern "C" int run_backward(
    void* logits, int64_t type, int64_t offset, int64_t count, int64_t columns, int64_t inner, int64_t outer_stride,
    int64_t inner_stride, int64_t width, const int64_t* tokens, double temperature, const void* grad_log_probs,
    const void* grad_entropy, const void* entropy, const void* shift, const void* log_sum, void* out,
    int64_t out_offset, int64_t out_stride) {
  const auto element = static_cast<Element>(type);
  const int64_t bytes = element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
  for (int64_t first = 0; first < columns; first += width) {
    const int64_t some = std::min(width, columns - first);
    const LogitRows rows{static_cast<char*>(logits) + (offset + first) * bytes, element, count, some, first, inner,
                         outer_stride, inner_stride};
    const int error = softmax_gradient(
        rows, tokens, temperature, {grad_log_probs, grad_entropy, entropy, shift, log_sum},
        static_cast<char*>(out) + (out_offset + first) * bytes, out_stride, nullptr);
    if (error != 0) return error;
  }
  return 0;
}
extern "C" int run_pairs(const void* a, const void* b, void* out, int64_t type, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    unsigned x, y;
    std::memcpy(&x, static_cast<const char*>(a) + 4 * i, 4);
    std::memcpy(&y, static_cast<const char*>(b) + 4 * i, 4);
    x = type == 1 ? larger_pair<__nv_bfloat16>(x, y) : larger_pair<__half>(x, y);
    std::memcpy(static_cast<char*>(out) + 4 * i, &x, 4);
  }
  return 0;
}
"""
SOURCE = '#include "token_log_probs.cu"\n#include "token_log_probs_backward.cu"\n'
kernels = emulated(SOURCE, EXPORTS)
TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def forward(kernels, logits, tokens, temperature=1.0, *, offset=0, stride=None, width=None, seed=0, at_end=False):
    """log_probs, entropy, shift and log_sum of [N, V] logits whose rows are ``stride`` apart, ``offset`` in."""
    count, columns = logits.shape
    stride, width, result = stride or columns, width or columns, result_dtype(logits.dtype)
    memory = torch.full((offset + (count - 1) * stride + columns,), torch.nan, dtype=logits.dtype)
    memory[offset:].as_strided((count, columns), (stride, 1)).copy_(logits)
    states = 3 * count * (-(-columns // width) * (width * logits.element_size() // 65536 + 1))
    outputs = [guarded(torch.full((count,), 7.0, dtype=result)) for _ in range(5)]
    kernels.run(
        "run_forward", guarded(memory, at_end=at_end), TYPE[logits.dtype], offset, count, columns, count, 0, stride,
        width, guarded(tokens), float(temperature), guarded(torch.zeros(states, dtype=result), at_end=False), *outputs,
        seed=seed,
    )  # fmt: skip
    return outputs[1:]


def backward(kernels, logits, tokens, temperature, by_log_probs, by_entropy, results, *, offset=0, stride=None,
             out_offset=0, width=None, in_place=False, seed=0):  # fmt: skip
    """The gradient of by_log_probs . log_probs + by_entropy . entropy by the logits, [N, V]."""
    count, columns = logits.shape
    stride, width, result = stride or columns, width or columns, result_dtype(logits.dtype)
    memory = torch.zeros(offset + (count - 1) * stride + columns, dtype=logits.dtype)
    memory[offset:].as_strided((count, columns), (stride, 1)).copy_(logits)
    memory = guarded(memory, at_end=False)
    out, out_offset, out_stride = (memory, offset, stride) if in_place else (None, out_offset, columns)
    if out is None:
        out = guarded(torch.full((out_offset + count * columns,), torch.nan, dtype=logits.dtype), at_end=False)
    saved = [guarded(x.to(result)) for x in (by_log_probs, by_entropy, *results[1:])]
    outs = [] if in_place else [out]
    arguments = [memory, TYPE[logits.dtype], offset, count, columns, count, 0, stride, width, guarded(tokens)]
    kernels.run("run_backward", *arguments, float(temperature), *saved, *(outs or [memory]), out_offset, out_stride,
                seed=seed)  # fmt: skip
    return out[out_offset:].as_strided((count, columns), (out_stride, 1)).clone()


def truth(logits, tokens, temperature, by_log_probs=None, by_entropy=None):
    """log_probs, entropy and the gradient, from the formulas in float64."""
    x = logits.double() / temperature
    log_p = x - x.amax(-1, keepdim=True)
    log_p = log_p - log_p.exp().sum(-1, keepdim=True).log()
    p = log_p.exp()
    p_log_p = torch.where(p > 0, p * log_p, 0.0)
    entropy = -p_log_p.sum(-1)
    rows = torch.arange(len(tokens))
    if by_log_probs is None:
        return log_p[rows, tokens], entropy
    one_hot = torch.zeros_like(p)
    one_hot[rows, tokens] = 1
    of_token = torch.where(one_hot > 0, -torch.expm1(log_p), -p)
    gradient = by_log_probs[:, None] * of_token - by_entropy[:, None] * (p_log_p + p * entropy[:, None])
    return log_p[rows, tokens], entropy, gradient / temperature


def edges(dtype):
    """Vocabularies around one element, one word, a group of loads of a warp, a warp's longest row, a block's part."""
    word = 16 // dtype.itemsize
    return [
        1, 2, word - 1, word, word + 1, 2 * word - 1, 2 * word, 3 * word + 1, 33 * word, 129 * word + 1, 130 * word - 1,
        1025 * word + word - 1, 1026 * word, 1026 * word + 1, 4097 * word + word - 1, 4098 * word, 8195 * word + 3,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("edge", range(17))
def test_forward_and_backward_at_every_edge(kernels, dtype, edge):
    columns = edges(dtype)[edge]
    logits, temperature = randn(3, columns, dtype=dtype, scale=3.0, seed=edge), 0.7
    tokens = torch.tensor([0, columns // 2, columns - 1])
    results = forward(kernels, logits, tokens, temperature, seed=edge)
    weights = randn(3, dtype=torch.float64, seed=1), randn(3, dtype=torch.float64, seed=2)
    log_probs, entropy, gradient = truth(logits, tokens, temperature, *weights)
    assert_near(results[0], log_probs, result_dtype(dtype))
    assert_near(results[1], entropy, result_dtype(dtype))
    got = backward(kernels, logits, tokens, temperature, *weights, results, seed=edge)
    assert_gradient_near(got, gradient, gradient_terms(logits, tokens, temperature, *weights), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("middle", [0.0, 1e3])
def test_error_is_no_larger_than_torchs_own(kernels, dtype, scale, middle):
    logits, tokens = (randn(4, 9000, scale=scale) + middle).to(dtype), randint(9000, 4)
    ones = torch.ones(4, dtype=torch.float64)
    results = forward(kernels, logits, tokens)
    log_probs, entropy, gradient = truth(logits, tokens, 1.0, ones, 0 * ones)
    own = torch.log_softmax(logits.to(result_dtype(dtype)), -1)
    one_hot = torch.nn.functional.one_hot(tokens, 9000)
    assert_error_within(results[0], own.gather(-1, tokens[:, None])[:, 0], log_probs, result_dtype(dtype))
    assert_error_within(results[1], -(own.exp() * own).sum(-1), entropy, result_dtype(dtype))
    got = backward(kernels, logits, tokens, 1.0, ones, 0 * ones, results)
    assert_error_within(got, (one_hot - own.exp()).to(dtype), gradient, dtype)
    assert_gradient_near(got, gradient, gradient_terms(logits, tokens, 1.0, ones, 0 * ones), dtype)
    assert got.double().sum(-1).abs().max() < 9000 * 2e-3 * got.double().abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_rows_bits_depend_on_the_row_alone(kernels, dtype):
    """Not on its neighbours, on where it starts in memory, on the stride, or on the order of threads and blocks."""
    word = 16 // dtype.itemsize
    for columns in (5 * word + 3, 1100 * word + 1, 4200 * word + 5):
        logits, tokens = randn(9, columns, dtype=dtype, scale=2.0), randint(columns, 9)
        together = forward(kernels, logits, tokens, 1.3)
        for offset in range(word):
            alone = forward(kernels, logits[4:5], tokens[4:5], 1.3, offset=offset, seed=offset + 1)
            spread = forward(kernels, logits[3:6], tokens[3:6], 1.3, offset=offset, stride=columns + 5, seed=offset)
            for whole, one, three in zip(together, alone, spread, strict=True):
                assert torch.equal(whole[4:5], one) and torch.equal(whole[3:6], three)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_larger_of_two_pairs(kernels, dtype):
    """As the GPU's instruction has it, which the CPU cannot run."""
    special = torch.tensor([0.0, -1.0, 3.0, 3.5, torch.inf, -torch.inf, torch.nan, 6e4, 1e-6], dtype=dtype)
    a, b = special.repeat(10), special.repeat_interleave(10)
    out = guarded(torch.zeros_like(a))
    kernels.run("run_pairs", guarded(a), guarded(b), out, TYPE[dtype], len(a) // 2)
    assert torch.equal(out.nan_to_num(), a.fmax(b).nan_to_num())
    assert out.isnan().sum() == (a.isnan() & b.isnan()).sum() > 0


def test_no_load_beyond_the_end_of_memory(kernels):
    for columns in (8, 64, 1024, 8 * 1030):  # the last row ends where memory does
        logits, tokens = randn(2, columns, dtype=torch.bfloat16), randint(columns, 2)
        forward(kernels, logits, tokens, at_end=True)
        forward(kernels, logits, tokens, offset=8, at_end=True)


def test_two_leading_dimensions(kernels):
    """As logits[:, :-1] of [B, S, V] has them: rows of a sequence lie V apart, sequences S * V."""
    whole, tokens = randn(3, 5, 77, dtype=torch.bfloat16), randint(77, 12)
    outputs = [guarded(torch.empty(12)) for _ in range(5)]
    kernels.run(
        "run_forward", guarded(whole, at_end=False), TYPE[torch.bfloat16], 0, 12, 77, 4, 5 * 77, 77, 77,
        guarded(tokens), 1.0, guarded(torch.empty(36)), *outputs,
    )  # fmt: skip
    dense = forward(kernels, whole[:, :-1].reshape(12, 77), tokens)
    for actual, wanted in zip(outputs[1:], dense, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("in_place", [False, True])
def test_every_token_and_every_start_of_the_gradient(kernels, dtype, in_place):
    columns, word = 61, 16 // dtype.itemsize
    logits, tokens = randn(61, columns, dtype=dtype), torch.arange(61)
    weights = randn(61, dtype=torch.float64, seed=1), randn(61, dtype=torch.float64, seed=2)
    results = forward(kernels, logits, tokens, 1.2)
    *_, gradient = truth(logits, tokens, 1.2, *weights)
    terms = gradient_terms(logits, tokens, 1.2, *weights)
    for offset in range(word):
        for out_offset in range(1 if in_place else 2):
            got = backward(
                kernels, logits, tokens, 1.2, *weights, results, offset=offset, stride=columns + 1,
                out_offset=out_offset, in_place=in_place, seed=offset,
            )  # fmt: skip
            assert_gradient_near(got, gradient, terms, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 24, 256, 999])
def test_a_vocabulary_in_chunks(kernels, dtype, width):
    """The head's way: the statistics of chunks of columns make those of whole rows; gradients in place."""
    columns, temperature = 1000, 0.9
    logits, tokens = randn(5, columns, dtype=dtype, scale=3.0), torch.tensor([0, width, width - 1, 999, 500])
    weights = randn(5, dtype=torch.float64, seed=1), randn(5, dtype=torch.float64, seed=2)
    results = forward(kernels, logits, tokens, temperature, width=width, stride=1008)
    log_probs, entropy, gradient = truth(logits, tokens, temperature, *weights)
    assert_near(results[0], log_probs, result_dtype(dtype))
    assert_near(results[1], entropy, result_dtype(dtype))
    got = backward(kernels, logits, tokens, temperature, *weights, results, width=width, stride=1008, in_place=True)
    assert_gradient_near(got, gradient, gradient_terms(logits, tokens, temperature, *weights), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [40, 8300])
def test_impossible_tokens(kernels, dtype, columns):
    logits = randn(3, columns, dtype=dtype)
    logits[:, ::3] = -torch.inf
    logits[2, : columns // 2] = -torch.inf  # whole words, and whole groups of them
    tokens = torch.tensor([0, 1, columns - 2 if (columns - 2) % 3 else columns - 1])
    weights = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    results = forward(kernels, logits, tokens, 0.9)
    log_probs, entropy, gradient = truth(logits, tokens, 0.9, *weights)
    assert results[0][0] == -torch.inf
    assert_near(results[0][1:], log_probs[1:], result_dtype(dtype))
    assert_near(results[1], entropy, result_dtype(dtype))
    got = backward(kernels, logits, tokens, 0.9, *weights, results)
    assert got.isfinite().all()
    terms = gradient_terms(logits, tokens, 0.9, *weights)
    assert_gradient_near(got[1:], gradient[1:], terms[1:], dtype)
    assert (got[1:][logits[1:] == -torch.inf] == 0).all()


@pytest.mark.parametrize("columns", [50, 9000])
@pytest.mark.parametrize("place", [0, 33, -1])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_row_without_a_distribution_is_nan_and_alone(kernels, columns, place, bad):
    logits, tokens = randn(3, columns), torch.tensor([3, 3, 3])
    logits[2] = logits[0]
    logits[1, place] = bad
    for result in forward(kernels, logits, tokens)[:2]:
        assert result[1].isnan() and result[0].isfinite() and result[0] == result[2]
    logits[1] = -torch.inf
    results = forward(kernels, logits, tokens)
    for result in results[:2]:
        assert result[1].isnan() and result[0].isfinite() and result[0] == result[2]
    ones = torch.ones(3)
    got = backward(kernels, logits, tokens, 1.0, ones, ones, results)
    assert got[1].isnan().all() and torch.equal(got[0], got[2]) and got[0].isfinite().all()


def test_huge_logits_do_not_overflow(kernels):
    logits, tokens = torch.tensor([[3e38, -3e38, 3e38], [-3.4e38, -3.4e38, -3e38]]), torch.tensor([0, 2])
    results = forward(kernels, logits, tokens)
    assert_near(results[0], torch.tensor([0.5, 1.0], dtype=torch.float64).log(), torch.float32)
    assert_near(results[1], torch.tensor([2.0, 1.0], dtype=torch.float64).log(), torch.float32)
    got = backward(kernels, logits, tokens, 1.0, torch.ones(2), torch.ones(2), results)
    assert_near(got, torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]]), torch.float32)


@pytest.mark.parametrize("blocks", [2**31, 2**32 + 1])
@pytest.mark.parametrize("columns", [9, 9000])  # eight rows a block, and one
def test_more_blocks_than_a_grid_has_are_refused(kernels, columns, blocks):
    logits, tokens = guarded(torch.zeros(columns)), guarded(torch.zeros(8, dtype=torch.int64))
    rows = (blocks - 1) * 8 + 1 if columns == 9 else blocks
    shape = (logits, 0, 0, rows, columns, rows, 0, 0, columns, tokens, 1.0)
    saved, states = [guarded(torch.zeros(8)) for _ in range(5)], guarded(torch.zeros(60))
    with pytest.raises(LaunchError, match="error 9"):
        kernels.run("run_forward", *shape, states, *saved)
    with pytest.raises(LaunchError, match="error 9"):
        kernels.run("run_backward", *shape, *saved, logits, 0, 0)
    assert not any(x.any() for x in (*saved, states, logits))


CODE = """
import torch
from ops.test_token_log_probs_kernels import EXPORTS, SOURCE, forward
from ops.cuda_emulation import emulate
forward(emulate(SOURCE, EXPORTS), torch.zeros(2, 9), torch.tensor([0, {token}]))
"""


@pytest.mark.parametrize("token", [-1, 9])
def test_a_token_outside_the_vocabulary_is_an_assertion(kernels, token):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "-c", CODE.format(token=token)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "tokens[i] < vocabulary" in done.stderr, done.stderr
