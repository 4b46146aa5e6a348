"""Finds the head of a reward model that another library saved, by its name among the weights.

transformers and TRL's reward trainer call it ``score``; OpenRLHF ``score`` or ``value_head``, in folders whose
config.json may not say how many outputs there are; TRL's value-head models ``v_head.summary``, with a bias.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.folders import read_json, tensors_of

_NAMES = ("score", "value_head", "v_head.summary", "v_head")


def find_head(folder: Path) -> tuple[str, dict[str, Tensor]] | None:
    """The head's name, and its tensors ``weight`` ``[outputs, H]`` and perhaps ``bias``; None where there is none.

    Raises:
        InputError: there are several.
    """
    tensors = dict(tensors_of(folder, tuple(f"{name}." for name in _NAMES)))
    heads = {
        name: {kind: tensors[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in tensors}
        for name in _NAMES
        if f"{name}.weight" in tensors
    }
    if len(heads) > 1:
        raise InputError(f"{folder}: the weights have several heads ({', '.join(heads)}): which one scores is unknown")
    return next(iter(heads.items()), None)


def tells_outputs(folder: Path) -> bool:
    """Whether config.json says how many outputs the head has."""
    config = read_json(folder / "config.json")
    return "num_labels" in config or "id2label" in config


def put_head(model: PreTrainedModel, name: str, head: dict[str, Tensor], where: str | Path) -> None:
    """Gives ``model.score`` the weight of a head of another name; its bias becomes a part of the scores' mean.

    Raises:
        InputError: it is no linear layer of one output on this trunk.
    """
    score = model.score
    assert isinstance(score, nn.Linear)
    if head["weight"].shape != score.weight.shape:
        raise InputError(
            f"{where}: the head {name}.weight is {list(head['weight'].shape)}, and a reward model of this trunk has "
            f"{list(score.weight.shape)}: give a reward model's folder"
        )
    with torch.no_grad():
        score.weight.copy_(head["weight"])


def normalise_as_saved(config: PretrainedConfig, head: dict[str, Tensor]) -> None:
    """Mean and deviation of the scores as the folder has them: OpenRLHF's, or a head's bias."""
    if getattr(config, "normalize_reward", False) and hasattr(config, "mean") and hasattr(config, "std"):
        config.reward_mean, config.reward_std = float(config.mean), float(config.std)
    if "bias" in head:
        config.reward_mean = float(getattr(config, "reward_mean", 0.0)) - float(head["bias"].float().sum())
