"""The methods that sample and need no critic, by name, with options that make each do all that it does."""

from __future__ import annotations

from typing import Any

from rlhf_lightning import modules

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPOModule", {"group_size": 4}),
    "dr_grpo": (
        "GRPOModule",
        {"group_size": 4, "scale_by_std": False, "kl": {"loss_coef": 0.0}, "objective": {"normalisation": "constant"}},
    ),
    "dapo": (
        "GRPOModule",
        {
            "group_size": 2,
            "dynamic_sampling": True,
            "train_prompts": 2,
            "kl": {"loss_coef": 0.0},
            "objective": {"clip_high": 0.28, "normalisation": "token"},
        },
    ),
    "rloo": ("RLOOModule", {"group_size": 4, "kl": {"coef": 0.3}}),
    "reinforce": ("ReinforcePlusPlusModule", {"gamma": 0.9, "kl": {"coef": 0.3}}),
    "reinforce_baseline": ("ReinforcePlusPlusModule", {"group_size": 4, "baseline": "group_mean", "kl": {"coef": 0.3}}),
    "rejection_sampling": ("RejectionSamplingModule", {"group_size": 4, "keep": 2}),
    "online_dpo": ("OnlineDPOModule", {"group_size": 3, "beta": 0.3}),
}


COARSE = ("dapo",)  # tested with a reward that often is the same for a whole group


def method(name: str) -> tuple[type, dict[str, Any]]:
    """The module's class and the options."""
    cls, options = METHODS[name]
    return getattr(modules, cls), options
