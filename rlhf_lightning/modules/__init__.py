"""The stages of training as LightningModules."""

from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule

__all__ = ["DPOModule", "PPOModule", "RLHFModule", "RewardModelModule", "SFTModule"]
