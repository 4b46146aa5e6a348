"""Samples responses to prompts, with their log-probs."""

from rlhf_lightning.rollout.engine import Responses, RolloutEngine, Sampling
from rlhf_lightning.rollout.hugging_face import TransformersEngine
from rlhf_lightning.rollout.native import NativeEngine

__all__ = ["NativeEngine", "Responses", "RolloutEngine", "Sampling", "TransformersEngine"]
