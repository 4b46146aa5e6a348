"""An option that takes a few words refuses any other: every ``Literal`` in the package, found by its annotation."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from tiny_models import make_config, make_tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import rlhf_lightning
from rlhf_lightning.algorithms.advantages import token_rewards
from rlhf_lightning.algorithms.kl import kl_estimate
from rlhf_lightning.algorithms.losses import preference_loss, token_shares
from rlhf_lightning.batches import View
from rlhf_lightning.data.choices import check_fit, wanted
from rlhf_lightning.data.collate import collate, encoding
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.data.ids import TextIds
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.models.building import NetworkOptions
from rlhf_lightning.models.export import export_policy, export_scalar, try_export
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.online_dpo import OnlineDPOModule
from rlhf_lightning.modules.reinforce import ReinforcePlusPlusModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.preferences.agreement import alpha, alpha_interval
from rlhf_lightning.preferences.exchange import formed
from rlhf_lightning.preferences.units import Mark, Units
from rlhf_lightning.preferences.votes import export
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rewards.ensemble import Ensemble
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.rollout.answering import batches_by_length
from rlhf_lightning.training.credit import AdvantageOptions
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.objective import ClippedObjective, ObjectiveOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import preference_losses

WORD: Any = "no_such_word"
ONES = torch.ones(2)
MASK = torch.ones(2, 3, dtype=torch.bool)
LENGTHS = torch.tensor([3, 3])


def tokenizer() -> Any:
    return make_tokenizer("<pad>")


def policy() -> Policy:
    return Policy(LlamaForCausalLM(make_config()))


def scalar() -> ScalarModel:
    return ScalarModel(LlamaForSequenceClassification(make_config(num_labels=1, pad_token_id=0)))


def units() -> Units:
    return Units.of([Mark(("i", "", ""), name, 1, 1) for name in "ab"])


# Place -> a call of it with an unknown word, all its other arguments being right.
CALLS: dict[str, Callable[[], Any]] = {
    "algorithms.advantages.token_rewards(score_position)": lambda: token_rewards(
        ONES, torch.ones(2, 3), LENGTHS, ONES > 1, ONES, 0.1, score_position=WORD
    ),
    "algorithms.kl.kl_estimate(estimator)": lambda: kl_estimate(ONES, ONES, WORD),
    "algorithms.losses.preference_loss(kind)": lambda: preference_loss(ONES, ONES, 0.1, kind=WORD),
    "algorithms.losses.token_shares(normalisation)": lambda: token_shares(MASK, WORD, 3),
    "batches.View(demonstrations)": lambda: View("prompts", demonstrations=WORD),
    "batches.View(kind)": lambda: View(WORD),
    "data.choices.check_fit(kind)": lambda: check_fit([], WORD, "data.columns"),
    "data.choices.wanted(kind)": lambda: wanted(None, WORD, False),  # type: ignore[arg-type]
    "data.collate.collate(kind)": lambda: collate([], WORD, 0),
    "data.collate.encoding(kind)": lambda: encoding([], WORD),
    "data.datamodule.PreferenceDataModule(long_prompts)": lambda: PreferenceDataModule("x.jsonl", long_prompts=WORD),
    "data.datamodule.PreferenceDataModule(long_responses)": lambda: PreferenceDataModule(
        "x.jsonl", long_responses=WORD
    ),
    "data.datamodule.PreferenceDataModule(special_tokens)": lambda: PreferenceDataModule(
        "x.jsonl", special_tokens=WORD
    ),
    "data.datamodule.PreferenceDataModule(train_on)": lambda: PreferenceDataModule("x.jsonl", train_on=WORD),
    "data.ids.TextIds(special)": lambda: TextIds(tokenizer(), WORD),
    "data.tokenization.Encoder(long_prompts)": lambda: Encoder(tokenizer(), long_prompts=WORD),
    "data.tokenization.Encoder(long_responses)": lambda: Encoder(tokenizer(), long_responses=WORD),
    "data.tokenization.Encoder(special_tokens)": lambda: Encoder(tokenizer(), special_tokens=WORD),
    "data.tokenization.Encoder(train_on)": lambda: Encoder(tokenizer(), train_on=WORD),
    "data.tokenization.Encoder.encode(kind)": lambda: Encoder(tokenizer()).encode([], WORD),
    "models.export.export_policy(dtype)": lambda: export_policy(policy(), tokenizer(), "unwritten", WORD),
    "models.export.export_scalar(dtype)": lambda: export_scalar(scalar(), tokenizer(), "unwritten", WORD),
    "models.export.try_export(dtype)": lambda: try_export(policy(), tokenizer(), "unwritten", WORD),
    "preferences.agreement.alpha(level)": lambda: alpha(units(), WORD),
    "preferences.agreement.alpha_interval(level)": lambda: alpha_interval(units(), WORD),
    "preferences.exchange.formed(form)": lambda: formed({"id": "i"}, WORD),
    "preferences.votes.export(votes)": lambda: export(None, WORD),  # type: ignore[arg-type]
    "rewards.ensemble.Ensemble(aggregate)": lambda: Ensemble([Reward(), Reward()], WORD),
    "rewards.function.FunctionReward(on_error)": lambda: FunctionReward("math:fsum", on_error=WORD),
    "models.building.NetworkOptions(export_dtype)": lambda: NetworkOptions(export_dtype=WORD),
    "modules.dpo.DPOModule(loss_type)": lambda: DPOModule("model", loss_type=WORD),
    "modules.online_dpo.OnlineDPOModule(loss_type)": lambda: OnlineDPOModule("model", loss_type=WORD),
    "modules.reinforce.ReinforcePlusPlusModule(baseline)": lambda: ReinforcePlusPlusModule("model", baseline=WORD),
    "modules.reward_model.RewardModelModule(head)": lambda: RewardModelModule("model", head=WORD),
    "modules.reward_model.RewardModelModule(normalise)": lambda: RewardModelModule("model", normalise=WORD),
    "training.objective.ClippedObjective(kl_estimator)": lambda: ClippedObjective(
        ObjectiveOptions(), KLOptions(), 8, kl_estimator=WORD
    ),
    "rollout.answering.batches_by_length(kind)": lambda: batches_by_length(Encoder(tokenizer()), [], WORD, 1),
    "training.credit.AdvantageOptions(score_position)": lambda: AdvantageOptions(score_position=WORD),
    "training.critic.CriticOptions(kind)": lambda: CriticOptions(kind=WORD),
    "training.kl_control.KLOptions(estimator)": lambda: KLOptions(estimator=WORD),
    "training.kl_control.KLOptions(loss_estimator)": lambda: KLOptions(loss_coef=1.0, loss_estimator=WORD),
    "models.policy.Policy(critic)": lambda: Policy(LlamaForCausalLM(make_config()), WORD),
    "training.pairs.preference_losses(kind)": lambda: preference_losses(ONES, ONES, 0.1, WORD, 0.0),
    "training.objective.ObjectiveOptions(normalisation)": lambda: ObjectiveOptions(normalisation=WORD),
    "training.objective.ObjectiveOptions(old_log_probs)": lambda: ObjectiveOptions(old_log_probs=WORD),
    "training.optimizer.AdamWOptions(schedule)": lambda: AdamWOptions(schedule=WORD),
}

# Not called here.
SPARED = (
    "models.building.ModelFactory.policy(critic)",  # hands it on to that one
    "demo.methods.Method(kind)",  # made in its own file alone, which --help loads and which so imports nothing
)


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(rlhf_lightning.__path__, "rlhf_lightning."):
        if found.name.rpartition(".")[2] not in ("__main__", "_C"):
            yield importlib.import_module(found.name)


def literals_in(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in literals_in(part))


def functions_of(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The module's public functions, methods and constructors; a private one gets what a public one has checked."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", "") != module.__name__ or name.startswith("_"):
            continue
        if inspect.isclass(value):
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)  # of a classmethod or staticmethod
                if inspect.isfunction(function) and method in ("__init__", "__new__"):
                    yield name, function
                elif inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function
        elif inspect.isfunction(value):
            yield name, value


def places() -> dict[str, tuple[Any, ...]]:
    """``module.function(parameter)`` -> the words that it takes."""
    loaded = list(modules())
    # Aliases that a module imports for its annotations alone are not in it at run time.
    aliases = {name: value for module in loaded for name, value in vars(module).items() if literals_in(value)}
    found = {}
    for module in loaded:
        for name, function in functions_of(module):
            for parameter, annotation in inspect.get_annotations(function).items():
                # One annotation at a time: a class that is unknown at run time hides that parameter alone.
                alone = type("Alone", (), {"__annotations__": {parameter: annotation}})
                try:
                    hint = get_type_hints(alone, vars(module), aliases)[parameter]
                except NameError:
                    continue
                if parameter != "return" and (words := literals_in(hint)):
                    found[f"{module.__name__.removeprefix('rlhf_lightning.')}.{name}({parameter})"] = words
    return found


PLACES = places()


def test_every_literal_is_called_or_spared() -> None:
    left = {place for place in PLACES if not place.startswith(SPARED)}
    assert left == set(CALLS)


@pytest.mark.parametrize("place", sorted(CALLS))
def test_an_unknown_word_is_refused_with_the_known_ones(place: str) -> None:
    with pytest.raises(ValueError, match=WORD) as refused:
        CALLS[place]()
    assert [word for word in PLACES[place] if word not in str(refused.value)] == []


def test_the_walk_sees_literals_in_unions_and_methods() -> None:
    assert PLACES["models.policy.Policy(critic)"] == ("head",)
    assert PLACES["data.tokenization.Encoder.encode(kind)"] == ("demonstrations", "pairs", "labels", "prompts")
