"""Groups of options: values that their types do not allow are refused where they are made, in a script too."""

from __future__ import annotations

import dataclasses

import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.training.credit import AdvantageOptions
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.objective import ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions, SamplingOptions
from rlhf_lightning.training.shaping import ScoreOptions


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        (AdamWOptions, "learning_rate", -1.0, "a number above 0"),
        (AdamWOptions, "schedule", "cosin", "constant or linear or cosine"),
        (SamplingOptions, "max_new_tokens", 0, "a whole number above 0"),
        (RolloutOptions, "eval_temperature", -0.5, "a number from 0 up or None"),
        (UpdateOptions, "epochs", None, "a whole number above 0"),
        (ObjectiveOptions, "normalisation", "tokens", "token or sequence or constant"),
        (ObjectiveOptions, "old_log_probs", "compute", "recompute or rollout"),
        (KLOptions, "estimator", "k4", "k1 or k2 or k3"),
        (KLOptions, "loss_estimator", "k1", "k2 or k3 or None"),
        (AdvantageOptions, "score_position", "first", "last_token or after_eos"),
        (AdvantageOptions, "gamma", 1.5, "a number from 0 to 1"),
        (CriticOptions, "kind", "heads", "model or head"),
        (NetworkOptions, "export_dtype", "float8", "auto or"),
    ],
)
def test_a_value_of_another_kind_is_refused(group: type, name: str, value: object, expected: str) -> None:
    with pytest.raises(InputError, match=f"{group.__name__}.{name}: expected .*{expected}.*, got {value!r}"):
        group(**{name: value})


@pytest.mark.parametrize(
    ("group", "options", "told"),
    [
        (LoRAOptions, {"alpha": 4.0}, "model.lora.alpha: 4.0 has no meaning without model.lora.rank"),
        (SamplingOptions, {"top_p": 1.5}, "model.sampling.top_p: expected a probability"),
        (RolloutOptions, {"temperature": 0.0}, "model.sampling.temperature: 0 leaves nothing to learn from"),
        (ScoreOptions, {"length_threshold": 3}, "model.scores.length_threshold: 3 has no effect without a penalty"),
    ],
)
def test_options_that_contradict_each_other_are_refused(group: type, options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        group(**options)


def test_groups_are_frozen_and_all_by_keyword() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KLOptions().coef = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        KLOptions(0.1)  # type: ignore[misc]
