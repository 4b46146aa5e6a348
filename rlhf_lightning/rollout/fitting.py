"""Chooses the engine of a rollout if the user has not chosen one."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharding import unsharded
from rlhf_lightning.rollout.engine import RolloutEngine, ready_to_decode
from rlhf_lightning.rollout.hugging_face import TransformersEngine
from rlhf_lightning.rollout.native import NativeEngine


def fitting_engine(policy: Policy) -> RolloutEngine:
    """The native engine, or transformers' generation if the native one cannot run the policy: same answers, slower."""
    engine = NativeEngine()
    try:
        with torch.inference_mode(False), torch.no_grad(), unsharded(policy), ready_to_decode(policy):
            engine.check(policy)
    except InputError:
        return TransformersEngine()
    return engine


def told_fitting_engine(policy: Policy) -> RolloutEngine:
    """`fitting_engine`, with a warning if it is the slower engine. Every process calls it."""
    engine = fitting_engine(policy)
    if isinstance(engine, TransformersEngine):
        rank_zero_warn(
            f"{type(policy.model).__name__}: this library's decode loop cannot run this model, so transformers' "
            "generation answers; it gives the same answers more slowly (model.engine names another)"
        )
    return engine
