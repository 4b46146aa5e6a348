"""The operators' definitions in float64 on the CPU, gradients written out: what any device is measured against.

Each takes tensors of any dtype and returns float64 tensors on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().cpu().double() for tensor in tensors]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2016, equation 16, over each row's counted steps, from the last one back."""
    mask = mask.cpu()
    r, v = (torch.where(mask, x, 0.0) for x in exact(rewards, values))
    advantages = torch.zeros_like(r)
    later, value_after = torch.zeros(len(r), dtype=torch.float64), torch.zeros(len(r), dtype=torch.float64)
    for t in range(r.shape[1] - 1, -1, -1):
        here = mask[:, t]
        now = r[:, t] + gamma * value_after - v[:, t] + gamma * lam * later
        advantages[:, t] = torch.where(here, now, 0.0)
        later, value_after = torch.where(here, now, later), torch.where(here, v[:, t], value_after)
    return advantages, torch.where(mask, advantages + v, 0.0)


def softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p and entropy of ``[N, V]``; a row without a distribution is NaN."""
    (x,) = exact(logits)
    x = x / temperature
    top = x.amax(1, keepdim=True)
    z = (x - top).exp().sum(1, keepdim=True)
    log_p = x - top - z.log()
    p = log_p.exp()
    return p, log_p, -torch.where(p > 0, p * log_p, 0.0).sum(1) + 0.0 * z[:, 0]


def token_log_probs(
    logits: Tensor, tokens: Tensor, temperature: float, by_log_probs: Tensor, by_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs, entropy, and the gradient by the logits of ``by_log_probs . log_probs + by_entropy . entropy``."""
    p, log_p, entropy = softmax(logits, temperature)
    rows, tokens = torch.arange(len(p)), tokens.cpu()
    a, b = (x[:, None] for x in exact(by_log_probs, by_entropy))
    grad = -a * p - b * torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
    grad[rows, tokens] += a[:, 0]
    return log_p[rows, tokens], entropy, grad / temperature


def gradient_terms(
    logits: Tensor, tokens: Tensor, temperature: float, by_log_probs: Tensor, by_entropy: Tensor
) -> Tensor:
    """``[N, V]``: how far a rounding moves each element of :func:`token_log_probs`'s gradient, over that rounding.

    A sum of powers is at least 1, so its logarithm, and log p and the entropy with it, carry a whole rounding however
    small they are; a rounding of log p is relative to 1 + |log p| and moves p by as much. The size of the terms that
    may cancel is counted with it.
    """
    p, log_p, entropy = softmax(logits, temperature)
    a, b = (x[:, None].abs() for x in exact(by_log_probs, by_entropy))
    size = -torch.where(p > 0, log_p, 0.0)
    of_token = p.clone()
    of_token[torch.arange(len(p)), tokens.cpu()] = 1  # p and 1 - p
    return (a * of_token + b * p * (1 + size + entropy[:, None])) * (1 + size) / temperature


def linear_token_log_probs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, by_log_probs: Tensor, by_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of ``hidden @ weight.T``, with the gradients by hidden and weight."""
    h, w = exact(hidden, weight)
    log_probs, entropy, grad = token_log_probs(h @ w.T, tokens, temperature, by_log_probs, by_entropy)
    return log_probs, entropy, grad @ w, grad.T @ h


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, token_weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss = -sum(token_weights * log_probs), log_probs, entropy, and the loss's gradients by hidden and weight."""
    (weights,) = exact(token_weights)
    log_probs, entropy, by_hidden, by_weight = linear_token_log_probs(
        hidden, weight, tokens, temperature, -weights, torch.zeros_like(weights)
    )
    return -(weights * log_probs).sum(), log_probs, entropy, by_hidden, by_weight


def sampling(
    logits: Tensor, draws: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, list[set[int]]]:
    """log p ``[B, V]`` after temperature and filters, its entropy, and the tokens that each draw may give: more than
    one where the draw is within 1e-5 of a border between two."""
    p, _, _ = softmax(logits, temperature or 1.0)
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_k > 0:
        kept &= p >= p.sort(1, descending=True).values[:, min(top_k, p.shape[1]) - 1 :][:, :1]
    if top_p < 1:
        q = torch.where(kept, p, 0.0)
        q = q / q.sum(1, keepdim=True)
        ordered, order = q.sort(dim=1, descending=True, stable=True)
        kept &= torch.zeros_like(kept).scatter(1, order, ordered.cumsum(1) - ordered < top_p)
    q = torch.where(kept, p, 0.0)
    q = q / q.sum(1, keepdim=True)
    entropy = -torch.where(q > 0, q * q.log(), 0.0).sum(1)
    if temperature == 0:
        return q.log(), entropy, [{int(row.argmax())} for row in p]
    right = q.cumsum(1)
    near = (right > draws[:, None] - 1e-5) & (right - q < draws[:, None] + 1e-5) & (q > 0)
    return q.log(), entropy, [set(row.nonzero()[:, 0].tolist()) for row in near]


def clipped_policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, clipped, gradient, and how near to its nearest switch between branches each element is."""
    new, old, a = exact(log_probs, old, advantages)
    change = new - old
    ratio = change.clamp(-20, 20).exp()
    free, bounded = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    clipped = bounded > free
    loss = torch.maximum(free, bounded)
    flat = clipped | (change.abs() > 20)
    edge = torch.minimum((ratio - 1 + low).abs(), (ratio - 1 - high).abs())
    edge = torch.minimum(edge, (change.abs() - 20).abs())
    if dual is not None:
        over = (a < 0) & (loss > -dual * a)
        loss, flat = torch.where(over, -dual * a, loss), flat | over
        edge = torch.minimum(edge, (ratio - dual).abs())
    return loss, clipped, torch.where(flat, 0.0, free), edge


def clipped_value_loss(
    values: Tensor, old: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of the value loss."""
    v, old, target = exact(values, old, returns)
    free = 0.5 * (v - target) ** 2
    if clip is None:
        return free, torch.zeros_like(v, dtype=torch.bool), v - target, torch.full_like(v, torch.inf)
    bounded = 0.5 * (old + (v - old).clamp(-clip, clip) - target) ** 2
    beyond = (v - old).abs() - clip
    clipped = (beyond > 0) & (bounded > free)
    edge = torch.where(beyond > 0, torch.minimum(beyond, (bounded - free).abs()), -beyond)
    return torch.where(clipped, bounded, free), clipped, torch.where(clipped, 0.0, v - target), edge
