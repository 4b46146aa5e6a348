"""Metrics as sums and counts, so that a mean over micro-batches and processes is the mean over all the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.collectives import all_reduce_sum

Metrics = dict[str, tuple[Tensor, Tensor]]  # by name: values, and which of them count, of one shape


class Totals:
    """Named running means; `means` adds up those of all processes, which must have added under the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Counts ``values`` (where ``mask`` is True, or all of them) into the mean called ``name``.

        A float ``mask`` gives weights; where it is 0 a value is ignored, even NaN.
        """
        values = values.detach().double()
        weights = torch.ones_like(values) if mask is None else mask.double()
        sums = torch.stack([torch.where(weights > 0, values * weights, 0.0).sum(), weights.sum()])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def total(self, name: str) -> float:
        """The sum of what was counted into ``name``, over all processes, all of which must ask."""
        return float(all_reduce_sum(self._sums[name])[0])

    def means(self) -> dict[str, float]:
        """The mean of each name over everything added by all processes, in one all-reduce; NaN where nothing was."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        # Some sums were made on the CPU (a gradient norm), the others where the model is.
        device = next((sums.device for sums in self._sums.values() if sums.device.type != "cpu"), torch.device("cpu"))
        reduced = all_reduce_sum(torch.stack([self._sums[name].to(device) for name in names])).cpu()
        return {name: (total / count).item() for name, (total, count) in zip(names, reduced, strict=True)}
