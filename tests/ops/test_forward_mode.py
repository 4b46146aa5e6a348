"""Tangents: the native operators with gradients have none, and say so instead of answering 0; the references have."""

from __future__ import annotations

import pytest
import torch
from ops.support import needs_native, randint, randn
from tolerances import assert_near
from torch.autograd import forward_ad

from rlhf_lightning.ops import linear_cross_entropy, linear_token_log_probs, token_log_probs
from rlhf_lightning.ops.linear_cross_entropy import reference as cross_entropy_reference
from rlhf_lightning.ops.linear_token_log_probs import reference as linear_reference
from rlhf_lightning.ops.token_log_probs import reference as log_probs_reference

TOKENS, WEIGHTS = randint(11, 5, seed=3), torch.ones(5, dtype=torch.float64)
HIDDEN, WEIGHT = randn(5, 4, dtype=torch.float64, seed=1), randn(11, 4, dtype=torch.float64, seed=2)
LOGITS = randn(5, 11, dtype=torch.float64)
OF_LOGITS = {"token_log_probs": (token_log_probs, log_probs_reference)}
OF_HEADS = {
    "linear_token_log_probs": (linear_token_log_probs, linear_reference),
    "linear_cross_entropy": (
        lambda h, w, t: linear_cross_entropy(h, w, t, WEIGHTS)[:1],
        lambda h, w, t: cross_entropy_reference(h, w, t, WEIGHTS)[:1],
    ),
}
# name, the operator of one operand, its reference, that operand
CASES = [
    *((name, lambda x, f=f: f(x, TOKENS), lambda x, r=r: r(x, TOKENS), LOGITS) for name, (f, r) in OF_LOGITS.items()),
    *(
        (name, lambda x, f=f: f(x, WEIGHT, TOKENS), lambda x, r=r: r(x, WEIGHT, TOKENS), HIDDEN)
        for name, (f, r) in OF_HEADS.items()
    ),
    *(
        (name, lambda x, f=f: f(HIDDEN, x, TOKENS), lambda x, r=r: r(HIDDEN, x, TOKENS), WEIGHT)
        for name, (f, r) in OF_HEADS.items()
    ),
]
cases = pytest.mark.parametrize(
    ("name", "function", "reference", "operand"), CASES, ids=[f"{name}-{x.shape[0]}" for name, *_, x in CASES]
)


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, tangent))


def jvp(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))


def jacfwd(function, x, tangent):
    return torch.func.jacfwd(function)(x)


def vmap_in_jvp(function, x, tangent):
    return jvp(lambda y: torch.vmap(lambda z: function(z * y))(torch.ones(2, dtype=torch.float64)), x, tangent)


@needs_native
@cases
@pytest.mark.parametrize("transform", [dual, jvp, jacfwd, vmap_in_jvp])
@pytest.mark.parametrize("trained", [False, True])
def test_a_tangent_is_refused_in_words(name, function, reference, operand, transform, trained):
    x = operand.clone().requires_grad_(trained)
    words = f"^{name}: gradients are first order, reverse mode only, this one was asked for with a tangent"
    with pytest.raises(NotImplementedError, match=words):
        transform(function, x, torch.ones_like(x))


@needs_native
@cases
def test_what_has_no_tangent_is_not_refused(name, function, reference, operand):
    wanted, scale = function(operand)[0], torch.tensor(2.0, dtype=torch.float64)
    got, tangent = jvp(lambda y: y * function(operand)[0], scale, torch.ones_like(scale))
    assert torch.equal(got, 2 * wanted) and torch.equal(tangent, wanted)
    got, tangent = jvp(lambda y: y.sum() * function(y.detach())[0], operand, torch.ones_like(operand))
    assert_near(tangent, operand.numel() * wanted, torch.float64)


@cases
def test_the_references_tangents_are_differences(name, function, reference, operand):
    """So RLHF_LIGHTNING_OPS=reference is where to ask for them."""
    direction, step = randn(*operand.shape, dtype=torch.float64, seed=9), 1e-5
    _, tangents = jvp(lambda x: tuple(reference(x)), operand, direction)
    ahead, behind = reference(operand + step * direction), reference(operand - step * direction)
    for tangent, a, b in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-7, atol=1e-7)


@needs_native
@cases
def test_compiled_whole_beside_a_tangent_elsewhere(name, function, reference, operand):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: function(x)[0], fullgraph=True, backend="aot_eager")
    with forward_ad.dual_level():
        assert torch.equal(compiled(operand), function(operand)[0])
