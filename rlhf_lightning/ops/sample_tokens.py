"""Draws a token from each row of logits, with its log-probability and the entropy, in one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.ops import checks, extension

_NAME = "sample_tokens"


def sample_tokens(
    logits: Tensor, draws: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse-CDF draws: the first token whose cumulative probability exceeds the row's uniform draw.

    The naive equivalent, in float64::

        p = filtered(logits / temperature).softmax(-1)
        tokens = torch.searchsorted(p.cumsum(-1), draws[:, None], right=True)[:, 0]
        log_probs = p.log().gather(-1, tokens[:, None])[:, 0]
        entropy = torch.special.entr(p).sum(-1)

    A row's result depends only on its own logits and draw, bitwise: not on other rows, nor on the number of threads.

    Args:
        logits: ``[B, V]`` floating point; -inf marks an impossible token, which is never drawn.
        draws: ``[B]`` float64 in (0, 1).
        temperature: divides the logits, in ``[1e-12, 1e12]``; or 0, which takes the first of the most probable tokens,
            with log-prob and entropy as at temperature 1.
        top_k: keep the k most probable tokens, and all that tie with the last of them; 0 keeps all.
        top_p: in (0, 1]. Of the tokens that top-k keeps, keep the smallest set of most probable ones whose probability
            reaches top_p; of equal ones the first come first (Holtzman et al. 2020, arXiv 1904.09751). 1 keeps all.

    Returns:
        ``(tokens, log_probs, entropy)``, each ``[B]``, int64 and twice float32 (float64 for float64 logits), without
        gradient. Log-prob and entropy, in nats, are those of the distribution after temperature and filters. If a row
        has NaN or +inf or nothing above -inf, both are NaN, and its token is an arbitrary one of the vocabulary.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or value.
    """
    _check(logits, draws, temperature, top_k, top_p)
    if extension.use_native(_NAME, logits.device):
        return torch.ops.rlhf_lightning.sample_tokens(logits.detach(), draws, temperature, top_k, top_p)
    return reference(logits, draws, temperature, top_k, top_p)


@torch.no_grad()
def reference(
    logits: Tensor, draws: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sample_tokens` in plain PyTorch, in float64."""
    dtype = checks.compute_dtype(logits)
    logits = logits.double() if temperature == 0 else logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    log_probs = logits.log_softmax(dim=-1)
    probabilities = log_probs.exp()
    if temperature == 0:
        tokens = log_probs.argmax(dim=-1)
    else:
        cumulative = probabilities.cumsum(dim=-1)
        # Rounding leaves the total a little off 1, so draws are scaled by it, and kept below it. Else a draw just below
        # 1 could skip all tokens. right=True skips tokens of probability 0.
        total = cumulative[:, -1]
        points = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    # Clamped, because 0 * -inf is NaN.
    entropy = -torch.linalg.vecdot(probabilities, log_probs.clamp(min=torch.finfo(torch.float64).min))
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0].to(dtype), entropy.to(dtype)


def _check(logits: Tensor, draws: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    checks.float_tensor(_NAME, "logits", logits)
    checks.float64_tensor(_NAME, "draws", draws)
    if logits.dim() != 2 or not 0 < logits.shape[1] < 2**30:
        raise ValueError(f"{_NAME}: logits must have shape [B, V] with 0 < V < 2^30, got shape {list(logits.shape)}")
    checks.same_shape(_NAME, "draws", draws, logits.shape[:1], "logits without its last dimension")
    checks.same_device(_NAME, "draws", draws, logits.device, "logits")
    checks.temperature_range(_NAME, temperature, or_zero=True)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"{_NAME}: top_k must be an integer, 0 or above, got {type(top_k).__name__}")
    if top_k < 0:
        raise ValueError(f"{_NAME}: top_k must be an integer, 0 or above, got {top_k}")
    checks.number(_NAME, "top_p", top_p, "a number in (0, 1]", 0.0, 1.0, open_low=True)


def _fake(logits: Tensor, draws: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.compute_dtype(logits)
    return (
        draws.new_empty(draws.shape, dtype=torch.int64),
        logits.new_empty(draws.shape, dtype=dtype),
        logits.new_empty(draws.shape, dtype=dtype),
    )


if extension.LOADED:
    torch.library.register_fake("rlhf_lightning::sample_tokens", _fake)
