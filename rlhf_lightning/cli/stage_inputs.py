"""Explains missing inputs of a stage: a config reads the model that another config's run leaves.

All of it comes from the shipped configs: ``run`` and ``runs`` say which model a stage leaves, and the other paths say
what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.cli.configs import shipped_configs
from rlhf_lightning.cli.runs import family, started
from rlhf_lightning.errors import InputError

_DEMO = Path("runs/demo")
_PROGRAM = "python -m rlhf_lightning"


def check_inputs(options: dict[str, Any]) -> None:
    """Raises an InputError if a model or file of another stage is missing, with the commands that make it.

    Args:
        options: the parsed options, as nested mappings.
    """
    for key, text in _texts({name: options.get(name) for name in ("model", "data")}):
        if not Path(text).exists() and (way := _way_to(text)):
            raise InputError(f"--{key} {text}: is not there yet; {way}")


def what_to_try(configs: Sequence[Path]) -> str:
    """Advice for a shipped config that lacks options: run the stages before it, or the demo's config of that name."""
    names = [name for config in configs if (name := _shipped_name(config)) and f"demo/{name}" in shipped_configs()]
    if not names:
        return ""
    before = [_command(name) for name in _stages_to(names[0])]
    first = f"the stages before it are `{'`, `'.join(before)}`; " if before else ""
    return f"{first}{_try_the_demo(names[0])}"


def newer_models(options: dict[str, Any]) -> Iterator[str]:
    """A line for each model that is read although a newer run of the same name has left one."""
    for key, text in _texts({name: options.get(name) for name in ("model", "data")}):
        path = Path(text)
        if path.name != "model" or not path.is_dir():
            continue
        run = path.parent
        runs = [other for other in family(run.parent, re.sub(r"-\d+$", "", run.name)) if (other / "model").is_dir()]
        if runs and runs[-1] != run and started(runs[-1]) > started(run):
            newer = runs[-1] / "model"
            yield f"{path} is read, and {newer} is newer (--{key} {newer})"


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists with its dotted key, without ``init_args`` in it."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)


@cache
def _shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load(shipped_configs()[name].read_text(encoding="utf-8")) or {}


def _shipped_name(path: Path) -> str | None:
    return next((name for name, shipped in shipped_configs().items() if shipped.resolve() == path.resolve()), None)


def _leaves(name: str) -> str | None:
    """The model that a shipped config's run leaves."""
    config = _shipped(name)
    return f"{config.get('runs') or 'runs'}/{config['run']}/model" if config.get("run") else None


def _stages_to(name: str) -> list[str]:
    """The shipped configs to run before ``name``, in order: those whose models it needs and that do not exist yet."""
    stages: list[str] = []
    makers = {leaves: other for other in shipped_configs() if (leaves := _leaves(other))}
    for _, text in _texts(_shipped(name).get("model")):
        if text in makers and not Path(text).exists():
            stages += [stage for stage in (*_stages_to(makers[text]), makers[text]) if stage not in stages]
    return stages


def _command(name: str) -> str:
    """The command that runs a shipped config, with placeholders for missing options."""
    config = _shipped(name)
    given = dict(_texts({"model": config.get("model"), "data": config.get("data")}))
    options = [("model.model", "MODEL"), ("data.path", "FILE")]
    return f"fit --config {name}" + "".join(f" --{key} {value}" for key, value in options if key not in given)


def _way_to(text: str) -> str:
    """How to make a missing model or file; "" if no stage of this library makes it."""
    path = Path(text)
    if path.is_relative_to(_DEMO):
        return f"`{_PROGRAM} demo` leaves the models and data of configs/demo"
    if path == Path("models/smollm2"):
        return "`make smollm2` fetches it"
    name = next((name for name in shipped_configs() if _leaves(name) == path.as_posix()), None)
    if name is None:
        return ""
    commands = "`, `".join(_command(stage) for stage in (*_stages_to(name), name))
    others = [run for run in family(path.parent.parent, path.parent.name) if (run / "model").is_dir()]
    newer = f"{others[-1] / 'model'} is; or " if others else ""
    demo = f", or {_try_the_demo(name)}" if f"demo/{name}" in shipped_configs() else ""
    return f"{newer}run `{commands}` first{demo}"


def _try_the_demo(name: str) -> str:
    if (_DEMO / "sft" / "model").is_dir():
        return f"try it on the demo's models and data: `fit --config demo/{name}`"
    return f"try it on models and data that `{_PROGRAM} demo` leaves, by `fit --config demo/{name}`"
