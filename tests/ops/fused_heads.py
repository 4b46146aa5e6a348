"""The two operators that take the LM head in: how each is called, and what it should answer, unfused in float64.

Both are called with ``inputs``: hidden, weight, tokens, temperature, and then what weighs the tokens.
"""

from __future__ import annotations

import torch
from ops.support import randint, randn, result_dtype

from rlhf_lightning.ops import linear_cross_entropy, linear_token_log_probs
from rlhf_lightning.ops.linear_cross_entropy import reference as cross_entropy_reference
from rlhf_lightning.ops.linear_token_log_probs import reference as log_probs_reference


def operands(rows, size, vocabulary, dtype):
    hidden, weight = randn(rows, size, dtype=dtype, seed=1), randn(vocabulary, size, dtype=dtype, seed=2)
    return hidden, weight, randint(vocabulary, rows, seed=3), 0.8


def softmax(hidden, weight, tokens, temperature):
    """Probabilities, their logarithms, and 1 at each row's token."""
    scaled = torch.einsum("nh,vh->nv", hidden.double(), weight.double()) / temperature
    p = (scaled - scaled.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    return p, p.log(), torch.eye(p.shape[1], dtype=torch.float64)[tokens]


def unfused(hidden, weight, tokens, temperature):
    """Log-probs and entropy as torch computes them, the logits rounded to the operands' dtype."""
    log_p = torch.log_softmax((hidden @ weight.T).to(result_dtype(hidden.dtype)) / temperature, -1)
    return log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class TokenLogProbs:
    """linear_token_log_probs; its total is by_log_probs . log_probs + by_entropy . entropy."""

    name = "linear_token_log_probs"
    function, reference = staticmethod(linear_token_log_probs), staticmethod(log_probs_reference)
    differentiable = slice(0, 2)  # of what `call` answers
    slack = 10

    @staticmethod
    def case(rows, size, vocabulary, dtype):
        by_log_probs, by_entropy = (randn(rows, dtype=torch.float64, seed=seed) for seed in (4, 5))
        return *operands(rows, size, vocabulary, dtype), by_log_probs, by_entropy

    @staticmethod
    def call(function, hidden, weight, tokens, temperature, by_log_probs, by_entropy):
        """The outputs, the total last."""
        log_probs, entropy = function(hidden, weight, tokens, temperature)
        return log_probs, entropy, (by_log_probs * log_probs + by_entropy * entropy).sum()

    @staticmethod
    def unfused(hidden, weight, tokens, temperature):
        return unfused(hidden, weight, tokens, temperature)

    @staticmethod
    def oracle(hidden, weight, tokens, temperature, by_log_probs, by_entropy):
        p, log_p, one_hot = softmax(hidden, weight, tokens, temperature)
        log_probs, entropy = log_p[torch.arange(len(tokens)), tokens], -(p * log_p).sum(1)
        by_logits = by_log_probs[:, None] * (one_hot - p) - by_entropy[:, None] * p * (log_p + entropy[:, None])
        by_logits = by_logits / temperature
        total = (by_log_probs * log_probs + by_entropy * entropy).sum()
        return log_probs, entropy, total, by_logits @ weight.double(), by_logits.T @ hidden.double()


class CrossEntropy:
    """linear_cross_entropy; its total is the loss."""

    name = "linear_cross_entropy"
    function, reference = staticmethod(linear_cross_entropy), staticmethod(cross_entropy_reference)
    differentiable = slice(2, 3)
    slack = 30

    @staticmethod
    def case(rows, size, vocabulary, dtype):
        token_weights = randn(rows, dtype=result_dtype(dtype), seed=4).abs()
        token_weights[::3] = 0
        return *operands(rows, size, vocabulary, dtype), token_weights

    @staticmethod
    def call(function, hidden, weight, tokens, temperature, token_weights):
        """The outputs, the total last."""
        loss, log_probs, entropy = function(hidden, weight, tokens, token_weights, temperature)
        assert not log_probs.requires_grad and not entropy.requires_grad
        return log_probs, entropy, loss

    @staticmethod
    def unfused(hidden, weight, tokens, token_weights, temperature):
        log_probs, entropy = unfused(hidden, weight, tokens, temperature)
        return -(token_weights * log_probs).sum(), log_probs.detach(), entropy.detach()

    @staticmethod
    def oracle(hidden, weight, tokens, temperature, token_weights):
        p, log_p, one_hot = softmax(hidden, weight, tokens, temperature)
        log_probs, entropy = log_p[torch.arange(len(tokens)), tokens], -(p * log_p).sum(1)
        by_logits = token_weights.double()[:, None] * (p - one_hot) / temperature
        loss = -(token_weights.double() * log_probs).sum()
        return log_probs, entropy, loss, by_logits @ weight.double(), by_logits.T @ hidden.double()


HEADS = (TokenLogProbs, CrossEntropy)


def run(head, function, hidden, weight, *rest):
    """The outputs, the total, and its gradients by hidden and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    outputs = head.call(function, hidden, weight, *rest)
    outputs[-1].backward()
    return *(output.detach() for output in outputs), hidden.grad, weight.grad
