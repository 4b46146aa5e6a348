"""The nearest known name to one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean X?)`` for the known name nearest to ``name``, or nothing where none is near.

    For dotted names the right key in the wrong place comes first (``kl_coef`` finds ``model.kl_coef``), then the
    nearest whole name, then the nearest last part. Where the first part is wrong, that is what is said.
    """
    known = list(known)
    by_last: dict[str, str] = {}
    for candidate in known:
        by_last.setdefault(candidate.rsplit(".", 1)[-1], candidate)
    head, _, rest = name.partition(".")
    heads = {candidate.partition(".")[0] for candidate in known if "." in candidate}
    near: str | None
    last = name.rsplit(".", 1)[-1]
    if rest and head not in heads and (near_head := _nearest(head, heads)):
        near = f"{near_head}.{rest}" if f"{near_head}.{rest}" in known else near_head
    else:
        near = by_last.get(last) or _nearest(name, known) or by_last.get(_nearest(last, by_last) or "")
    return f" (did you mean {prefix}{near}?)" if near else ""


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)
