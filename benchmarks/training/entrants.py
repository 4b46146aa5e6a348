"""Who takes part in which task, and the folder that each is imported from."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTALLED = Path(__file__).resolve().parent.parent.parent / "build" / "peers"
OURS = "ours"
TRL_PPO = "TRL 1.12.0 PPO"
PLAIN = "plain PyTorch"
TRL = "TRL 1.16.0"


@dataclass(frozen=True)
class Entrant:
    """``module``: the file here with its `run`; ``options``: what that is called with beyond the work."""

    module: str
    tasks: tuple[str, ...]
    folder: str | None = None  # of build/peers
    packages: tuple[str, ...] = ()  # whose versions are reported
    options: dict[str, Any] = field(default_factory=dict)

    def versions(self) -> dict[str, str]:
        """Of its packages, and torch; raises PackageNotFoundError."""
        return {name: importlib.metadata.version(name) for name in (*self.packages, "torch", "transformers")}

    def missing(self) -> str | None:
        """Why there is nothing to start."""
        if self.folder is None or (INSTALLED / self.folder).is_dir():
            return None
        reason = INSTALLED / f"{self.folder}.failed"
        if reason.exists():
            return "not installed: " + reason.read_text(encoding="utf-8").strip()
        return f"not installed: python benchmarks/peers/install.py {self.folder}"


ALL = ("ppo", "sft", "reward_model", "dpo")
ENTRANTS = {
    OURS: Entrant("ours", ALL, packages=("lightning",)),
    TRL_PPO: Entrant("trl_ppo", ("ppo",), "trl_ppo", ("trl", "accelerate")),
    PLAIN: Entrant("plain_ppo", ("ppo",)),
    TRL: Entrant("trl_offline", ("sft", "reward_model", "dpo"), "trl", ("trl", "accelerate")),
}
