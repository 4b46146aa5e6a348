"""Rewards, which score responses: a reward model, a Python function, or a combination of several."""

from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.combined import WeightedSum
from rlhf_lightning.rewards.ensemble import Ensemble
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rewards.model import ModelReward

__all__ = ["Ensemble", "FunctionReward", "ModelReward", "Reward", "WeightedSum"]
