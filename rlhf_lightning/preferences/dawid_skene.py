"""Dawid and Skene's model of annotators (1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
Algorithm"): each item has one true class, and each annotator has a probability of every answer given the class.

Symbols of the paper: ``T`` [I, C] is the posterior of the classes, ``p`` [C] their shares, and ``pi`` [A, C, L] the
annotators' probabilities of the L labels; here L = C.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_PRIOR = 1.0  # see `fit`
_STEPS, _ENOUGH = 500, 1e-9


@dataclass(frozen=True)
class Fit:
    """The model at its best."""

    posterior: Numbers  # [I, C], rows sum to 1
    shares: Numbers  # [C]
    confusion: Numbers  # [A, C, L], the last axis sums to 1
    objective: float  # log-likelihood of the labels
    steps: int
    converged: bool

    def accuracy(self) -> Numbers:
        """``[A]``: how probably each annotator answers with the true class."""
        classes = range(self.posterior.shape[1])
        return np.asarray(sum(self.shares[c] * self.confusion[:, c, c] for c in classes))


def fit(counts: Numbers, prior: float = _PRIOR) -> Fit:
    """Fits the model by EM (equations 2.3 to 2.5), from the shares of votes.

    Few judgements of an annotator would make their error rates 0 or 1, and one label of theirs would overrule all
    others. So each row of ``pi`` gets ``prior`` extra labels, spread as all annotators' labels are given that class (an
    empirical prior, which moves with the posterior; the steps then maximise no one objective). With ``prior`` 0 the fit
    is the paper's.

    Args:
        counts: ``[I, A, L]``, how often annotator a gave item i label l. Every label is a class.
        prior: number of extra labels; 0 or more.

    Returns: the fit, in the labelling of the votes, since EM starts at them.
    """
    posterior = counts.sum(axis=1)
    posterior = posterior / np.maximum(posterior.sum(axis=1, keepdims=True), 1e-300)
    before = -np.inf
    for step in range(1, _STEPS + 1):
        given = np.einsum("ic,ial->acl", posterior, counts)
        pooled = given.sum(axis=0) + 1e-9
        pooled = pooled / pooled.sum(axis=1, keepdims=True)
        raised = given + prior * pooled
        confusion = raised / np.maximum(raised.sum(axis=2, keepdims=True), 1e-300)
        shares = posterior.mean(axis=0)
        log_confusion = np.log(np.maximum(confusion, 1e-300))
        joint = np.einsum("ial,acl->ic", counts, log_confusion) + np.log(np.maximum(shares, 1e-300))
        most = joint.max(axis=1, keepdims=True)
        likelihood = np.exp(joint - most)
        objective = float(np.sum(most[:, 0] + np.log(likelihood.sum(axis=1))))
        posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
        if abs(objective - before) <= _ENOUGH * (1 + abs(objective)):
            return Fit(posterior, shares, confusion, objective, step, True)
        before = objective
    return Fit(posterior, shares, confusion, before, _STEPS, False)
