"""A checkpoint of another module, model, LoRA rank or critic is refused in one line that says what it was made with."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.made_with import check_made_with


def saved(module: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_other_options_are_named() -> None:
    with pytest.raises(
        InputError, match=r"made with model.lora.rank 4, and this run has null; give --model.lora.rank 4"
    ):
        SFTModule("model").on_load_checkpoint(saved(SFTModule("model", lora=LoRAOptions(rank=4))))
    with pytest.raises(InputError, match=r"made with model.critic.kind model, and this run has head"):
        PPOModule("model", critic=CriticOptions(kind="head")).on_load_checkpoint(saved(PPOModule("model")))
    SFTModule("model").on_load_checkpoint(saved(DPOModule("model")))  # the same weights, as `predict` may read
    SFTModule("model").on_load_checkpoint({})  # of an earlier version


def test_a_training_that_goes_on_from_another_methods_is_told() -> None:
    made = {"module": "DPOModule", "model": "model"}
    with pytest.warns(UserWarning, match="DPOModule made the checkpoint, and SFTModule goes on from its weights"):
        check_made_with(made, {}, "SFTModule")
    module = SFTModule("model")
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="SFTModule goes on"):
        module.on_load_checkpoint({"made_with": made})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.on_load_checkpoint({"made_with": {**made, "module": "SFTModule"}})
        module._trainer.state.fn = "validate"  # type: ignore[union-attr]
        module.on_load_checkpoint({"made_with": made})


@pytest.mark.parametrize("kind", [PPOModule, RewardModelModule])
def test_another_methods_state_is_missed(kind: Any) -> None:
    with pytest.raises(InputError, match=rf"made by SFTModule of model, and {kind.__name__} cannot go on from it"):
        kind("model").on_load_checkpoint(saved(SFTModule("model")))


@pytest.mark.parametrize("weights", [{"other": torch.ones(1)}, {"layer.weight": torch.ones(3, 3)}])
def test_another_model_is_one_line(weights: dict[str, Any]) -> None:
    module = SFTModule("big")
    module.layer = torch.nn.Linear(2, 2, bias=False)
    module.on_load_checkpoint(saved(SFTModule("small")))
    with pytest.raises(InputError, match=r"does not fit SFTModule of big \(.*made by SFTModule of small") as caught:
        module.load_state_dict(weights)
    assert "\n" not in str(caught.value)
