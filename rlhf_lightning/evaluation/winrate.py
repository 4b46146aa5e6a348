"""Win rates: how often one policy's answers are preferred to another's, with intervals, and corrected for length.

Both policies answer the same ``N`` prompts. A preference is 1 if A's answer is better, 0 if B's is, and 0.5 for a tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054  # two-sided 95% of a normal distribution
_MOST_STEPS = 100


@dataclass(frozen=True)
class WinRate:
    """A win rate with its interval, all between 0 and 1."""

    value: float
    low: float
    high: float


def preferences(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """``[N]`` float64: 1 if A scores higher than B on the same prompt, 0 if lower, 0.5 if equal.

    Raises:
        ValueError: the scores are not two finite vectors of one length, at least 1.
    """
    _check_vectors(scores_a, scores_b)
    return (torch.sign(scores_a.double() - scores_b.double()) + 1) / 2


def win_rate(preference: Tensor, z: float = Z95) -> WinRate:
    """The mean preference with Wilson's score interval (Wilson 1927, equation of the score test inverted).

    ``center = (p + z^2 / 2N) / (1 + z^2 / N)``,
    ``half = z / (1 + z^2 / N) * sqrt(p (1 - p) / N + z^2 / 4N^2)``.

    Unlike ``p +- z sqrt(p (1 - p) / N)`` it stays within [0, 1] and keeps its coverage near 0 and 1, where good
    policies are. With ties the variance of a preference is smaller than the ``p (1 - p)`` assumed here, so the interval
    is wider than necessary, never narrower.

    Args:
        preference: ``[N]`` in [0, 1], one for each prompt; prompts count as independent.
        z: quantile of the normal distribution; the default gives a 95% interval.

    Raises:
        ValueError: there is no preference, or one is outside [0, 1].
    """
    outcomes = _check_preference(preference)
    count, share = len(outcomes), float(outcomes.mean())
    shrink = 1 + z * z / count
    center = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # For shares of 0 and 1 one end should equal the share, but rounding may put it a little beyond.
    return WinRate(share, max(0.0, min(center - half, share)), min(1.0, max(center + half, share)))


def length_controlled_win_rate(
    preference: Tensor, lengths_a: Tensor, lengths_b: Tensor, ridge: float = 0.01, z: float = Z95
) -> WinRate:
    """The win rate that A would have over B if their answers were equally long.

    It uses the length term of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475, section 3). A
    logistic model ``P(A preferred) = sigmoid(theta + phi tanh((length_a - length_b) / s))``, with ``s`` the standard
    deviation of the length differences, is fitted to the preferences by Newton's method. At difference 0 it gives
    ``sigmoid(theta)``. AlpacaEval's term for the difficulty of a prompt is left out, since it needs many policies'
    answers to each prompt.

    Args:
        preference: ``[N]`` in [0, 1], one for each prompt.
        lengths_a, lengths_b: ``[N]``, in the same unit (characters compare across tokenizers).
        ridge: ``ridge / 2 (theta^2 + phi^2)`` is added to the summed negative log-likelihood, so that the fit exists
            if A always wins.
        z: quantile for the interval, which is theta's interval by the inverse Hessian, mapped through the sigmoid.

    If all length differences are equal, phi cannot be learned. If they are all 0, the result is the win rate. For any
    other constant the correction would be a guess, so the result is NaN.

    Raises:
        ValueError: the vectors have different lengths, there is no preference, or one is outside [0, 1].
    """
    outcomes = _check_preference(preference)
    _check_vectors(lengths_a, lengths_b)
    if len(lengths_a) != len(outcomes):
        raise ValueError(f"lengths: expected {len(outcomes)}, one a preference, got {len(lengths_a)}")
    difference = lengths_a.double() - lengths_b.double()
    scale = float(difference.std(correction=0))
    if scale == 0:
        return win_rate(outcomes, z) if float(difference[0]) == 0 else WinRate(math.nan, math.nan, math.nan)
    features = torch.stack([torch.ones_like(difference), torch.tanh(difference / scale)], dim=1)
    weights, covariance = fit_logistic(features, outcomes, ridge)
    theta, deviation = float(weights[0]), math.sqrt(float(covariance[0, 0]))
    return WinRate(_sigmoid(theta), _sigmoid(theta - z * deviation), _sigmoid(theta + z * deviation))


def fit_logistic(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Logistic regression by damped Newton steps, float64.

    Minimises ``sum_n -[y log s + (1 - y) log(1 - s)] + ridge / 2 |w|^2`` with ``s = sigmoid(x_n . w)``.

    Args:
        features: ``[N, F]``.
        targets: ``[N]`` in [0, 1], fractions allowed.
        ridge: above 0, which makes the minimum unique and finite.

    Returns: the weights ``[F]`` and the inverse Hessian at them ``[F, F]``.
    """
    if ridge <= 0:
        raise ValueError(f"ridge: expected a number above 0, got {ridge}")
    x, y = features.double(), targets.double()
    penalty = ridge * torch.eye(x.shape[1], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x @ w).sum() - (y * (x @ w)).sum() + ridge / 2 * w.square().sum()

    def curvature(w: Tensor) -> Tensor:
        share = torch.sigmoid(x @ w)
        return x.T @ (x * (share * (1 - share))[:, None]) + penalty

    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(_MOST_STEPS):
        gradient = x.T @ (torch.sigmoid(x @ weights) - y) + ridge * weights
        step = torch.linalg.solve(curvature(weights), gradient)
        size = 1.0
        # The loss is convex, so a short enough step lowers it. A full step can overshoot if the data are separable.
        while size > 1e-6 and bool(loss(weights - size * step) > loss(weights)):
            size /= 2
        weights = weights - size * step
        if float(step.abs().max()) < 1e-10:
            break
    return weights, torch.linalg.inv(curvature(weights))


def _sigmoid(value: float) -> float:
    return float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))


def _check_vectors(first: Tensor, second: Tensor) -> None:
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(
            f"expected two vectors of one length, at least 1, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError("expected finite numbers, got NaN or infinity")


def _check_preference(preference: Tensor) -> Tensor:
    outcomes = preference.double()
    if outcomes.ndim != 1 or len(outcomes) == 0 or not bool(((outcomes >= 0) & (outcomes <= 1)).all()):
        raise ValueError(f"preference: expected a vector of numbers in [0, 1], got shape {tuple(preference.shape)}")
    return outcomes
