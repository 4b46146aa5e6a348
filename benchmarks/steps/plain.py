"""The head as people write it: all logits of the responses in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def plain_log_probs(entropy_logged: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        logits = functional.linear(hidden, weight).float()
        log_p = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        log_probs = log_p.gather(-1, tokens[:, None])[:, 0]
        with torch.no_grad():
            wanted = entropy_logged and log_probs.requires_grad
            entropy = -(log_p.exp() * log_p).sum(-1) if wanted else torch.zeros_like(log_probs)
        return log_probs, entropy

    return function


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, token_weights: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    logits = functional.linear(hidden, weight).float()
    logits = logits if temperature == 1.0 else logits / temperature
    losses = functional.cross_entropy(logits, tokens, reduction="none")
    return (token_weights * losses).sum(), -losses.detach(), torch.zeros_like(losses)
