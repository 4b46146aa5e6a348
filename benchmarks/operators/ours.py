"""This library's operators, as its modules call them. Each function gives the call that makes the outputs."""

from __future__ import annotations

import torch

from operators.cases import FILTERS
from operators.inputs import CLIP, GAMMA, LAM, Inputs
from operators.torch_peers import Forward
from rlhf_lightning import ops


def release_kept_memory() -> None:
    """Gives the freed blocks that the operators keep for their next results back to the system."""
    from rlhf_lightning import _C

    _C.release_kept_memory()


def token_log_probs(inputs: Inputs) -> Forward:
    return lambda: dict(
        zip(("log_probs", "entropy"), ops.token_log_probs(inputs["logits"], inputs["tokens"]), strict=True)
    )


def linear_token_log_probs(inputs: Inputs) -> Forward:
    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: dict(zip(("log_probs", "entropy"), ops.linear_token_log_probs(hidden, weight, tokens), strict=True))


def linear_cross_entropy(inputs: Inputs) -> Forward:
    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    token_weights = torch.full(tokens.shape, 1 / tokens.numel(), device=tokens.device)

    def forward() -> dict[str, torch.Tensor]:
        loss, log_probs, entropy = ops.linear_cross_entropy(hidden, weight, tokens, token_weights)
        return {"loss": loss, "log_probs": log_probs, "entropy": entropy}

    return forward


def gae(inputs: Inputs) -> Forward:
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"]
    return lambda: dict(zip(("advantages", "returns"), ops.gae(rewards, values, mask, GAMMA, LAM), strict=True))


def clipped_policy_loss(inputs: Inputs) -> Forward:
    now, old, target = inputs["now"], inputs["old"], inputs["target"]
    return lambda: dict(zip(("loss", "clipped"), ops.clipped_policy_loss(now, old, target, CLIP, CLIP), strict=True))


def clipped_value_loss(inputs: Inputs) -> Forward:
    now, old, target = inputs["now"], inputs["old"], inputs["target"]
    return lambda: dict(zip(("loss", "clipped"), ops.clipped_value_loss(now, old, target, CLIP), strict=True))


def sample_tokens(inputs: Inputs) -> Forward:
    filters = {name: inputs.case.shape[name] for name in FILTERS if name in inputs.case.shape}
    names = ("tokens", "log_probs", "entropy")
    return lambda: dict(zip(names, ops.sample_tokens(inputs["logits"], inputs["draws"], **filters), strict=True))
