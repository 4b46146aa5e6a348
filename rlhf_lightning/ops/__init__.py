"""The native operators: each file holds one public function, its plain PyTorch reference, and its registration."""

from rlhf_lightning.ops.clipped_policy_loss import clipped_policy_loss
from rlhf_lightning.ops.clipped_value_loss import clipped_value_loss
from rlhf_lightning.ops.gae import gae
from rlhf_lightning.ops.linear_cross_entropy import linear_cross_entropy
from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs
from rlhf_lightning.ops.sample_tokens import sample_tokens
from rlhf_lightning.ops.token_log_probs import token_log_probs

__all__ = [
    "clipped_policy_loss",
    "clipped_value_loss",
    "gae",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "sample_tokens",
    "token_log_probs",
]
