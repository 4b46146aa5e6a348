"""Who takes part in which task, and the folder that each is imported from."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

import installed

OURS = "ours"
TRL_PPO = "TRL 1.12.0 PPO"
PLAIN = "plain PyTorch"
TRL = "TRL 1.16.0"


@dataclass(frozen=True)
class Entrant:
    """``module``: the file here with its `run`; ``compiled``: what that is called with where layers are compiled."""

    module: str
    tasks: tuple[str, ...]
    folder: str | None = None  # of build/peers
    packages: tuple[str, ...] = ()  # whose versions are reported
    compiled: dict[str, Any] = field(default_factory=dict)

    def versions(self) -> dict[str, str]:
        """Of its packages, and torch; raises PackageNotFoundError."""
        return {name: importlib.metadata.version(name) for name in (*self.packages, "torch", "transformers")}

    def missing(self) -> str | None:
        """Why there is nothing to start."""
        return installed.missing(self.folder)


ALL = ("ppo", "sft", "reward_model", "dpo")
ENTRANTS = {
    OURS: Entrant("ours", ALL, packages=("lightning",), compiled={"compile_layers": True}),
    TRL_PPO: Entrant("trl_ppo", ("ppo",), "trl_ppo", ("trl", "accelerate")),
    PLAIN: Entrant("plain_ppo", ("ppo",)),
    TRL: Entrant(
        "trl_offline", ("sft", "reward_model", "dpo"), "trl", ("trl", "accelerate"), compiled={"torch_compile": True}
    ),
}
