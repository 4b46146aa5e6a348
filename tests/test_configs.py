"""Every shipped YAML against the signatures, and every field of a signature against the code that should read it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.cli.classes import keys_of
from rlhf_lightning.cli.configs import resolve_configs, shipped_configs
from rlhf_lightning.cli.training import TrainingCLI
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.distributed import FSDP2Strategy
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
from rlhf_lightning.options import Options
from rlhf_lightning.rewards import Ensemble, FunctionReward, ModelReward, WeightedSum

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_lightning"
STAGES = {
    "sft.yaml": SFTModule,
    "reward_model.yaml": RewardModelModule,
    "ppo.yaml": PPOModule,
    "dpo.yaml": DPOModule,
    "grpo.yaml": GRPOModule,
    "rloo.yaml": RLOOModule,
    "reinforce.yaml": ReinforcePlusPlusModule,
    "rejection_sampling.yaml": RejectionSamplingModule,
    "online_dpo.yaml": OnlineDPOModule,
    "kto.yaml": KTOModule,
    "orpo.yaml": ORPOModule,
    "simpo.yaml": SimPOModule,
}
MODULES = list(STAGES.values())
OVERLAYS = ("fsdp.yaml", "lora.yaml")
EXPOSED = (
    *STAGES.values(),
    RLHFModule,
    PreferenceDataModule,
    FunctionReward,
    ModelReward,
    WeightedSum,
    Ensemble,
    RunCheckpoint,
    SampleTable,
    FSDP2Strategy,
)


@pytest.fixture(autouse=True)
def no_stage_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name models that other stages leave; here nothing has been run."""
    monkeypatch.setattr("rlhf_lightning.cli.training.check_inputs", lambda options: None)


class ParsedOnly(TrainingCLI):
    """The command line up to the point where something would be built."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*arguments: str) -> Any:
    return ParsedOnly(*resolve_configs(arguments)).options


def test_the_shipped_configs_are_known() -> None:
    assert {name for name in shipped_configs() if "/" not in name} == {*STAGES, *OVERLAYS}


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = ["--config", "sft.yaml", "--config", name] if name in OVERLAYS else ["--config", name]
    options = parse("fit", *configs, "--model.model", "MODEL", "--data.path", "FILE")
    module = STAGES[Path(name).name if name not in OVERLAYS else "sft.yaml"]
    assert options.model.class_path.endswith(f".{module.__name__}")
    assert options.model.init_args.model == "MODEL"


COMMANDS = re.findall(
    r"^    python -m rlhf_lightning ((?:fit|predict) .+)$", (PACKAGE.parent / "docs/methods.md").read_text(), re.M
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_methods_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse(*shlex.split(command))
    assert options.run  # the method's name, in the config or the command


EXAMPLES = sorted((PACKAGE.parent / "examples" / "smollm2").glob("*.yaml"))


@pytest.mark.parametrize("overlay", EXAMPLES, ids=lambda path: path.name)
def test_example_overlays_parse(overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE.parent)
    options = parse(
        "fit", "--config", "smollm2/ppo.yaml", "--config", str(overlay), "--data.path", "FILE", "--runs", str(tmp_path)
    )
    given = yaml.safe_load(overlay.read_text(encoding="utf-8"))["model"]["init_args"]["reward"]
    reward = options.model.init_args.reward
    assert reward.class_path.rsplit(".", 1)[-1] == given["class_path"].rsplit(".", 1)[-1]
    assert list(reward.init_args.weights) == given["init_args"]["weights"]
    for part in reward.init_args.rewards:
        if "function" in part.init_args:
            FunctionReward(part.init_args.function)


def leaves(node: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict) and "class_path" not in node:
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    return [(path, node)]


@pytest.mark.parametrize("name", [*STAGES])
def test_shipped_configs_hold_only_what_differs_from_the_defaults(name: str) -> None:
    config = yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8"))
    for prefix, cls in (("model", STAGES[name]), ("data", PreferenceDataModule)):
        section = config.get(prefix, {})
        given = section.get("init_args", {key: value for key, value in section.items() if key != "class_path"})
        parameters = all_parameters(cls)
        for path, value in leaves(given):
            default: Any = parameters[path[0]].default
            for part in path[1:]:
                default = getattr(default, part)
            assert value != default, f"{name}: {prefix}.{'.'.join(path)} repeats the default"


def all_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters, with those that ``**kwargs`` hands on to the base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or not base.__module__.startswith("rlhf_lightning"):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


# Every field has an effect


def package_reads() -> set[str]:
    """Names of attributes that some code of the package reads (``x.name`` not being assigned)."""
    reads = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.add(node.attr)
    return reads


READS = package_reads()


def own_parameters() -> list[tuple[type, str]]:
    classes = dict.fromkeys(
        base
        for cls in EXPOSED
        for base in cls.__mro__
        if base.__module__.startswith("rlhf_lightning") and "__init__" in vars(base)
    )
    return [
        (cls, name)
        for cls in classes
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def stored_as(function: ast.FunctionDef, name: str) -> tuple[list[str], int]:
    """Attributes that are nothing but the parameter (``self.x = name``), and how often it is read otherwise."""
    stored: list[str] = []
    plain: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id == name:
            targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
            stored += [target.attr for target in targets]
            plain.add(id(node.value))
    reads = sum(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) and id(node) not in plain
        for node in ast.walk(function)
    )
    return stored, reads


@pytest.mark.parametrize(("cls", "name"), own_parameters(), ids=lambda value: getattr(value, "__name__", value))
def test_every_constructor_parameter_is_read(cls: type, name: str) -> None:
    source = inspect.getsource(inspect.getmodule(cls))  # type: ignore[arg-type]
    (definition,) = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    (init,) = [node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    stored, reads = stored_as(init, name)
    saved = "save_hyperparameters" in ast.unparse(init)
    assert reads or any(attribute in READS for attribute in stored) or (saved and name in READS), (
        f"{cls.__name__}.{name} is stored as {stored} and never read"
    )


def groups() -> list[type[Options]]:
    kinds = [kind for cls in MODULES for kind in typing.get_type_hints(cls.__init__).values()]
    return list(dict.fromkeys(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)))


def test_every_option_of_a_group_is_read() -> None:
    for group in groups():
        unread = {field.name for field in dataclasses.fields(group)} - READS
        assert not unread, f"{group.__name__}: {unread}"


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_a_signature_shows_every_option(cls: type) -> None:
    """No ``**kwargs``; and the help of the command line has a line for each option, of a group too."""
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    parser = ArgumentParser()
    parser.add_class_arguments(cls, "it", fail_untyped=False, instantiate=False)
    silent = [
        action.dest
        for action in parser._actions
        if action.dest.removeprefix("it.") in keys_of(cls) and (not action.help or action.help == argparse.SUPPRESS)
    ]
    assert not silent


def test_a_module_has_at_most_two_classes_of_ours_above_it() -> None:
    for cls in MODULES:
        above = [base for base in cls.__mro__[1:] if base.__module__.startswith("rlhf_lightning")]
        assert len(above) <= 2 and above[-1] is RLHFModule, cls


def test_every_parameter_of_the_configurable_classes_is_typed() -> None:
    for cls in EXPOSED:
        for name, parameter in all_parameters(cls).items():
            assert parameter.annotation is not inspect.Parameter.empty, f"{cls.__name__}.{name} has no type"
