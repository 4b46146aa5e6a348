"""The table of the methods that the demo can run after its reward model. It imports little, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BEST_OF = 8  # answers that best-of-n chooses from


@dataclass(frozen=True)
class Method:
    """A method: a stage, trained by configs/demo/<name>.yaml, and a row of the comparison."""

    label: str
    doing: str  # the stage's heading
    kind: Literal["samples", "pairs", "untrained"]  # learns from its own samples and the reward model, or the rankings


METHODS = {
    "ppo": Method("PPO", "PPO against the reward model", "samples"),
    "grpo": Method("GRPO", "GRPO against the reward model, without a critic", "samples"),
    "rloo": Method("RLOO", "RLOO against the reward model, without a critic", "samples"),
    "reinforce": Method("REINFORCE++", "REINFORCE++ against the reward model, without a critic", "samples"),
    "online_dpo": Method("online DPO", "online DPO, the reward model as the judge", "samples"),
    "rejection_sampling": Method("rejection sampling", "SFT on the samples that the reward model likes", "samples"),
    "dpo": Method("DPO", "DPO, from the rankings", "pairs"),
    "kto": Method("KTO", "KTO, from the rankings", "pairs"),
    "orpo": Method("ORPO", "ORPO, from the rankings", "pairs"),
    "simpo": Method("SimPO", "SimPO, from the rankings", "pairs"),
    "best_of_n": Method(f"best of {BEST_OF}", "", "untrained"),
}
DEFAULT = ("ppo", "dpo")
