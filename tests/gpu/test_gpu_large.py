"""More elements than 32 bits can count, and the memory that the fused head takes; for a GPU with room for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu import oracles
from gpu.cases import Call
from tolerances import assert_gradient_near, assert_near

from rlhf_lightning import ops

LIMIT = 2**31


@pytest.fixture(autouse=True)
def empty_gpu(gpu: torch.device) -> Iterator[None]:
    """No test starts with what another left."""
    torch.cuda.empty_cache()
    torch.cuda.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def need(gigabytes: float) -> None:
    """Skip where the GPU has not so much free."""
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} GB are free")


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").normal_(std=scale)


def test_gae_of_more_than_2_to_31_steps():
    """The last rows of the whole are the bits of these rows alone, which the definition confirms."""
    rows, steps = LIMIT // 65536 + 5, 65536
    need(rows * steps * (4 + 4 + 1 + 4 + 4) / 1e9 + 2)
    rewards, values = random(rows, steps), random(rows, steps)
    mask = torch.empty(rows, steps, dtype=torch.bool, device="cuda").bernoulli_(0.9)
    whole = ops.gae(rewards, values, mask, 0.99, 0.95)
    tail = [x[-3:] for x in (rewards, values, mask)]
    truth = oracles.gae(*tail, 0.99, 0.95)
    for actual, alone, wanted in zip(whole, ops.gae(*tail, 0.99, 0.95), truth, strict=True):
        assert torch.equal(actual[-3:], alone)
        assert_near(actual[-3:].cpu(), wanted, torch.float32, times=10)


@pytest.mark.parametrize(("rows", "vocabulary"), [(LIMIT // 131080 + 9, 131080), (1, LIMIT + 8), (2, LIMIT // 2 + 4)])
def test_token_log_probs_of_more_than_2_to_31_logits(rows, vocabulary):
    need(2 * rows * vocabulary * 2 / 1e9 + 4)
    logits = random(rows, vocabulary, dtype=torch.bfloat16, scale=2.0)
    tokens = torch.full((rows,), vocabulary - 1, device="cuda")
    logits[-1, -1] = 9.0
    logits.requires_grad_()
    log_probs, entropy = ops.token_log_probs(logits, tokens, 1.0)
    (grad,) = torch.autograd.grad(log_probs.sum() + 0.5 * entropy.sum(), logits)
    # In float64, a slice of the row at a time: a whole one of 2^31 would take 16 GB.
    last = logits[-1].detach()
    total = weighted = torch.zeros((), dtype=torch.float64, device="cuda")
    for part in last.split(1 << 26):
        x = part.double()
        total, weighted = total + (x - 9).exp().sum(), weighted + ((x - 9).exp() * x).sum()
    log_z = 9 + total.log()
    true_entropy = log_z - weighted / total
    # Of 2^31 terms a float32 sum keeps less than of 2^17.
    assert_near(log_probs[-1], 9.0 - log_z, torch.float32, times=10)
    assert_near(entropy[-1], true_entropy, torch.float32, times=30)
    done = 0
    for part, of_part in zip(last.split(1 << 25), grad[-1].split(1 << 25), strict=True):
        done += part.numel()
        log_p = part.double() - log_z
        p = log_p.exp()
        wanted = -p - 0.5 * p * (log_p + true_entropy)
        if done == vocabulary:  # the token
            wanted[-1] += 1
        terms = (wanted.abs() + p + 0.5 * p * (1 - log_p + true_entropy)) * (1 - log_p)
        assert_gradient_near(of_part, wanted, terms, torch.bfloat16, times=30)


def test_linear_token_log_probs_of_more_than_2_to_31_logits_never_held():
    rows, width, vocabulary = 32771, 64, 65537
    need(6)
    assert rows * vocabulary > LIMIT
    hidden, weight = (
        random(rows, width, dtype=torch.bfloat16),
        random(vocabulary, width, dtype=torch.bfloat16, scale=0.3),
    )
    tokens = torch.arange(rows, device="cuda") % vocabulary
    tokens[-1] = vocabulary - 1
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    log_probs, _ = ops.linear_token_log_probs(*leaves, tokens, 1.0)
    by_hidden, by_weight = torch.autograd.grad(log_probs.sum(), leaves)
    with torch.no_grad():
        logits = hidden[-5:].double() @ weight.double().T
        log_p = logits.log_softmax(1)
        one_hot = torch.nn.functional.one_hot(tokens[-5:], vocabulary).double()
        assert_near(log_probs[-5:], log_p.gather(1, tokens[-5:, None])[:, 0], torch.bfloat16)
        wanted = (one_hot - log_p.exp()) @ weight.double()
        assert_near(by_hidden[-5:] / wanted.abs().max(), wanted / wanted.abs().max(), torch.bfloat16, times=2)
        wanted = torch.zeros(width, dtype=torch.float64, device="cuda")
        for h, t in zip(hidden.split(2048), tokens.split(2048), strict=True):  # of the last word's weight
            p = (h.double() @ weight.double().T).log_softmax(1)[:, -1].exp()
            wanted += ((t == vocabulary - 1).double() - p) @ h.double()
        assert_near(by_weight[-1] / wanted.abs().max(), wanted / wanted.abs().max(), torch.bfloat16, times=2)


@pytest.mark.parametrize("operator", ["clipped_policy_loss", "clipped_value_loss"])
def test_losses_of_more_than_2_to_31_tokens(operator):
    """The last tokens of the whole are the bits of these tokens alone, which the definition confirms."""
    size = LIMIT + 77
    need(size * 37 / 1e9 + 2)  # the inputs also as float32, and the gradient on its way, should they be copied
    new, old, third = (random(size, dtype=torch.bfloat16, scale=0.3) for _ in range(3))
    numbers = (0.2, 0.28, None) if operator == "clipped_policy_loss" else (0.2,)
    leaf = new.requires_grad_()
    loss, clipped = Call(operator, (), numbers, 1).outputs(leaf, old, third)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones((), device="cuda").expand(size))
    tail = Call(operator, tuple(x[-1000:] for x in (new, old, third)), numbers, 1)
    small = tail.leaves()
    loss_alone, clipped_alone = tail.outputs(*small)
    (grad_alone,) = torch.autograd.grad(loss_alone.sum(), small[0])
    for whole, alone in ((loss, loss_alone), (clipped, clipped_alone), (grad, grad_alone)):
        assert torch.equal(whole[-1000:], alone)
    truth = getattr(oracles, operator)(*small, *numbers)
    assert_near(loss_alone.detach().cpu(), truth[0], torch.float32, times=2)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(8192, 4096, 128256), (16384, 2048, 128256)])
def test_the_fused_head_holds_no_logits(rows, width, vocabulary):
    """Beyond its inputs and the gradients that it returns: 4 N H bytes and 3% of the logits at most, bf16."""
    logits = 2 * rows * vocabulary
    need((3 * vocabulary * width * 2 + 6 * rows * width * 2 + logits) / 1e9 + 1)
    hidden = random(rows, width, dtype=torch.bfloat16).requires_grad_()
    weight = random(vocabulary, width, dtype=torch.bfloat16, scale=0.02).requires_grad_()
    tokens = torch.arange(rows, device="cuda")

    def step() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        log_probs, entropy = ops.linear_token_log_probs(hidden, weight, tokens, 1.0)
        grads = torch.autograd.grad(log_probs.sum() + entropy.sum(), (hidden, weight))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)

    step()  # cuBLAS takes its workspace once
    extra = step()
    allowed = 4 * rows * width + 0.03 * logits
    assert extra <= allowed, (
        f"{extra / 1e6:.0f} MB, {allowed / 1e6:.0f} MB are allowed, the logits have {logits / 1e6:.0f}"
    )
