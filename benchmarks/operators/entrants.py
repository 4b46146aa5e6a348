"""Who takes part: each name of ``cases.py``, the folder it is imported from, and its function for each operator."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import installed

from operators import cases

OURS = "ours"


@dataclass(frozen=True)
class Entrant:
    """``functions``: operator to function, "" for all; ``distributions``: its package, the first name there is."""

    module: str
    functions: dict[str, str]
    folder: str | None = None  # of build/peers; None: nothing but torch
    distributions: tuple[str, ...] = ("torch",)

    def builder(self, operator: str) -> Callable:
        """The function that takes inputs and gives the call; importing it may fail, as the peer may."""
        function = self.functions.get(operator) or self.functions[""]
        return getattr(importlib.import_module(f"operators.{self.module}"), function)

    def version(self) -> str:
        """The package and its version; raises PackageNotFoundError."""
        for name in self.distributions[:-1]:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return f"{name} {importlib.metadata.version(name)}"
        return f"{self.distributions[-1]} {importlib.metadata.version(self.distributions[-1])}"

    def missing(self) -> str | None:
        """Why there is nothing to start."""
        return installed.missing(self.folder)


def _torch(function: str) -> Entrant:
    return Entrant("torch_peers", {"": function})


def _losses(kind: str) -> Entrant:
    operators = ("clipped_policy_loss", "clipped_value_loss")
    return Entrant("torch_peers", {name: f"{kind}_{name.removeprefix('clipped_')}" for name in operators})


OPERATORS = (
    "token_log_probs",
    "linear_token_log_probs",
    "linear_cross_entropy",
    "gae",
    "clipped_policy_loss",
    "clipped_value_loss",
    "sample_tokens",
)
ENTRANTS = {
    OURS: Entrant("ours", {name: name for name in OPERATORS}),
    cases.LIMIT: Entrant("limits", {"": "limit"}),
    cases.CROSS_ENTROPY: _torch("cross_entropy"),
    cases.COMPILED_CROSS_ENTROPY: _torch("compiled_cross_entropy"),
    cases.BF16_CROSS_ENTROPY: _torch("direct_cross_entropy"),
    cases.COMPILED_BF16_CROSS_ENTROPY: _torch("compiled_direct_cross_entropy"),
    cases.GATHER: _torch("gather"),
    cases.UNFUSED: _torch("unfused"),
    cases.TRL_LOOP: _torch("trl_loop"),
    cases.COMPILED_LOOP: _torch("compiled_loop"),
    cases.SCAN: _torch("log_step_scan"),
    cases.MULTINOMIAL: _torch("multinomial"),
    cases.EAGER: _losses("eager"),
    cases.COMPILED: _losses("compiled"),
    cases.ROW_KERNEL: Entrant("triton_peers", {"": "thread_per_row"}, distributions=("triton", "pytorch-triton")),
    cases.TRL_SELECTIVE: Entrant("library_peers", {"": "trl_selective"}, "trl", ("trl",)),
    cases.TRL_CHUNKED: Entrant("library_peers", {"": "trl_chunked"}, "trl", ("trl",)),
    cases.VERL_LOOP: Entrant("library_peers", {"": "verl_loop"}, "verl", ("verl",)),
    cases.LIGER: Entrant("library_peers", {"": "liger"}, "liger", ("liger-kernel",)),
    cases.LIGER_LINEAR: Entrant("library_peers", {"": "liger_linear"}, "liger", ("liger-kernel",)),
    cases.CCE: Entrant("library_peers", {"": "apple_cce"}, "cce", ("cut-cross-entropy",)),
    cases.FLASH: Entrant("library_peers", {"": "flash"}, "flash_attn", ("flash-attn",)),
}
