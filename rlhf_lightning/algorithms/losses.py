"""The losses of supervised and preference training, as pure functions of tensors.

Every loss is returned per row, ``[B]``. Callers weight the rows, add them up, and divide by the count of the whole
optimizer step, which only they know.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_lightning.errors import check_choice

PreferenceLoss = Literal["sigmoid", "ipo", "ipo_sum", "hinge"]
LossNormalisation = Literal["token", "sequence", "constant"]


class TokenShares(NamedTuple):
    """A batch's loss is ``(weights * token_loss).sum() / total``. Both add up over micro-batches and processes."""

    weights: Tensor  # [B, T] float32, 0 where a token does not count
    total: Tensor  # scalar float32


def token_shares(mask: Tensor, normalisation: LossNormalisation, constant: int) -> TokenShares:
    """The weight of each token in a mean of per-token losses.

    - ``token``: the mean over all tokens, so a long response counts more (Yu et al. 2025, arXiv 2503.14476, eq. 12).
    - ``sequence``: the mean over responses of the mean over their tokens (Shao et al. 2024, arXiv 2402.03300, eq. 3).
    - ``constant``: the mean over responses of the sum over their tokens, divided by a constant (Liu et al. 2025, arXiv
      2503.20783, section 3).

    Args:
        mask: ``[B, T]`` bool, the tokens that count; a response without any does not count as a response.
        normalisation: which of the three.
        constant: the divisor of ``constant``, usually the most tokens that a response may have.
    """
    check_choice("normalisation", normalisation, LossNormalisation)
    weights = mask.float()
    if normalisation == "token":
        return TokenShares(weights, weights.sum())
    lengths = mask.sum(dim=1, keepdim=True)
    over = lengths.clamp(min=1) if normalisation == "sequence" else constant
    return TokenShares(weights / over, (lengths > 0).sum().float())


def negative_log_likelihood(log_probs: Tensor, mask: Tensor) -> Tensor:
    """``-sum_t log p(token_t)`` over the counted tokens: the loss of supervised fine-tuning, in nats.

    Args:
        log_probs: ``[B, T]``, log-probs of the response tokens. Where the mask is False, entries are ignored, even NaN.
        mask: ``[B, T]`` bool.

    Returns: ``[B]``.
    """
    return -log_probs.masked_fill(~mask, 0.0).sum(dim=-1)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
    preferences: Tensor | None = None,
) -> Tensor:
    """The reward model's loss: ``-log sigmoid(chosen - rejected - margin)``.

    With a probability ``p`` that the chosen response is preferred, it is the cross-entropy
    ``-p log sigmoid(chosen - rejected) - (1 - p) log sigmoid(rejected - chosen)``.

    Args:
        chosen, rejected: ``[B]`` scores of the two responses.
        margins: ``[B]``, by how much the chosen score should exceed the other (Touvron et al. 2023, arXiv 2307.09288,
            eq. 2); None means 0.
        label_smoothing: the probability that a label is wrong; the loss is then the mean over both labels.
        centring: weight of ``(chosen + rejected)^2``, which keeps the scores around 0; without it they are determined
            only up to a constant (Eisenstein et al. 2023, arXiv 2312.09244).
        preferences: ``[B]``, p, from 0 to 1; None means 1.

    Returns: ``[B]``, in nats. Ouyang et al. 2022, arXiv 2203.02155, eq. 1; Bradley and Terry 1952.
    """
    ahead = chosen - rejected if margins is None else chosen - rejected - margins
    loss = -(1.0 - label_smoothing) * logsigmoid(ahead)
    if preferences is not None:
        p = (1.0 - label_smoothing) * preferences + label_smoothing * (1.0 - preferences)
        loss = -p * logsigmoid(ahead) - (1.0 - p) * logsigmoid(-ahead)
    elif label_smoothing > 0.0:  # skipped if it is 0, because 0 times an infinite loss would be NaN
        loss = loss - label_smoothing * logsigmoid(-ahead)
    if centring > 0.0:
        loss = loss + centring * (chosen + rejected).square()
    return loss


def preference_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    beta: float,
    kind: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The losses of direct preference optimisation, with ``h = chosen_log_ratio - rejected_log_ratio``.

    - ``sigmoid``: ``-log sigmoid(beta h)`` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with label smoothing e,
      ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`` (Mitchell 2023, "A note on DPO with noisy preferences").
    - ``ipo``, ``ipo_sum``: ``(h - 1 / (2 beta))^2`` (Azar et al. 2023, arXiv 2310.12036, eq. 17). The caller passes
      log-ratios that are averaged over each response's tokens for ``ipo``, and summed over them for ``ipo_sum``.
    - ``hinge``: ``max(0, 1 - beta h)`` (Zhao et al. 2023, arXiv 2305.10425, as in Liu et al. 2023, arXiv 2309.06657).

    Args:
        chosen_log_ratios, rejected_log_ratios: ``[B]``, log-prob of the response under the policy minus that under the
            reference, in nats.
        beta: how strongly the policy is kept near the reference; for the two IPO losses the tau of the paper.
        kind: which loss.
        label_smoothing: for ``sigmoid`` only; must be 0 for the others.

    Returns: ``[B]``.
    """
    check_choice("kind", kind, PreferenceLoss)
    assert kind == "sigmoid" or label_smoothing == 0.0, "label smoothing is defined for the sigmoid loss alone"
    ahead = chosen_log_ratios - rejected_log_ratios
    if kind == "sigmoid":
        return bradley_terry_loss(beta * chosen_log_ratios, beta * rejected_log_ratios, label_smoothing=label_smoothing)
    if kind == "hinge":
        return relu(1.0 - beta * ahead)
    return torch.square(ahead - 1.0 / (2.0 * beta))


def kto_loss(log_ratios: Tensor, baseline: Tensor, beta: float, *, desirable: bool) -> Tensor:
    """``1 - sigmoid(beta (r - z0))`` for a desirable response, ``1 - sigmoid(beta (z0 - r))`` for an undesirable one.

    Args:
        log_ratios: ``[B]``, r: the response's log-prob under the policy minus that under the reference, in nats.
        baseline: scalar, z0: the baseline of r, at least 0.
        beta: how fast the value saturates.
        desirable: whether all responses are desirable, or all undesirable.

    Returns: ``[B]``, between 0 and 1. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8 with weights of 1.
    """
    ahead = beta * (log_ratios - baseline)
    return torch.sigmoid(-ahead if desirable else ahead)


def log_odds(log_probs: Tensor) -> Tensor:
    """``log(p / (1 - p))`` from ``log p``, of the same shape. A p that rounds to 1 is lowered, so the result is finite.

    Hong et al. 2024, arXiv 2403.07691, eq. 4.
    """
    below_one = log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log sigmoid(log(odds(chosen) / odds(rejected)))``, the penalty of ORPO.

    Args:
        chosen, rejected: ``[B]``, mean log-prob of the response's tokens, in nats.

    Returns: ``[B]``, in nats. Hong et al. 2024, arXiv 2403.07691, eq. 7.
    """
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """``-log sigmoid(beta chosen - beta rejected - gamma)``.

    Args:
        chosen, rejected: ``[B]``, mean log-prob of the response's tokens, in nats.
        beta: scale of the reward.
        gamma: the margin by which the chosen response's reward should exceed the other.

    Returns: ``[B]``, in nats. Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)
