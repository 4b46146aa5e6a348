"""The stages of training as LightningModules."""

from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.grpo import GRPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.online_dpo import OnlineDPOModule
from rlhf_lightning.modules.orpo import ORPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reinforce import ReinforcePlusPlusModule
from rlhf_lightning.modules.rejection_sampling import RejectionSamplingModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.rloo import RLOOModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.simpo import SimPOModule

__all__ = [
    "DPOModule",
    "GRPOModule",
    "KTOModule",
    "ORPOModule",
    "OnlineDPOModule",
    "PPOModule",
    "RLHFModule",
    "RLOOModule",
    "ReinforcePlusPlusModule",
    "RejectionSamplingModule",
    "RewardModelModule",
    "SFTModule",
    "SimPOModule",
]
