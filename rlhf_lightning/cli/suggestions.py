"""The nearest known name to one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean X?)`` for the known name nearest to ``name``, or nothing where none is near.

    Dotted names are compared whole first, then by their last part, so ``model.kl_coeff`` finds ``model.kl_coef`` and
    ``kl_coef`` finds ``model.kl_coef``.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        by_last = {}
        for candidate in known:
            by_last.setdefault(candidate.rsplit(".", 1)[-1], candidate)
        last = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_last), n=1, cutoff=0.6)
        near = [by_last[last[0]]] if last else []
    return f" (did you mean {prefix}{near[0]}?)" if near else ""
