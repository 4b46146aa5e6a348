"""Finds config files and checks them before they are parsed, for mistakes that the parser accepts or explains badly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError
from rlhf_lightning.text import PACKAGE

# A wheel has the configs inside the package, a checkout beside it.
_SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")

_SECTIONS = ("trainer", "checkpoint", "samples")  # beside model and data, which may also be the name of a class


def shipped_configs() -> dict[str, Path]:
    """The shipped configs by name: ``{"ppo.yaml": ..., "smollm2/ppo.yaml": ...}``."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    if folder is None:
        return {}
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file ``name``, or else the shipped config of that name. Raises an InputError if neither exists."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    same = f"{path.with_suffix('')}.yaml"
    near = f" (did you mean {same}?)" if same in shipped else did_you_mean(name, shipped)
    hint = near or f"; the shipped ones are {', '.join(shipped)}"
    raise InputError(f"--config {name}: no such file, and no shipped config of that name{hint}")


def resolve_configs(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The command-line arguments with the found path after every ``--config``, and these paths in order.

    Each file is checked: it must be UTF-8 YAML with a mapping at the top and no key given twice. (The YAML loader
    silently keeps the last of two equal keys.)
    """
    resolved: list[str] = []
    paths: list[Path] = []
    expects_path = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expects_path:
            paths.append(_checked(find_config(argument)))
            resolved.append(str(paths[-1]))
            expects_path = False
        elif option in ("-c", "--config") and equals:
            paths.append(_checked(find_config(value)))
            resolved += [option, str(paths[-1])]
        else:
            expects_path = argument in ("-c", "--config")
            resolved.append(argument)
    if expects_path:
        raise InputError("--config expects the name of a file")
    return resolved, paths


def keys_with_lines(path: Path) -> list[tuple[str, int]]:
    """Every key of a YAML file as ``(dotted path, line)``, without ``init_args`` in it, as on the command line."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return [] if root is None else [(".".join(parts), line) for parts, line in _walk(root, ())]


def _walk(node: yaml.Node, parents: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, parents)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            parts = parents if key.value == "init_args" else (*parents, str(key.value))
            if key.value != "init_args":
                yield parts, key.start_mark.line + 1
            yield from _walk(value, parts)


def _checked(path: Path) -> Path:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if root is None:
        raise InputError(f"{path}: this config has no line; leave it out")
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path}: expected `key: value` lines at the top")
    _refuse_duplicates(root, path, "")
    for key, value in root.value:
        if isinstance(value, yaml.SequenceNode) and key.value in _SECTIONS:
            line = key.start_mark.line + 1
            raise InputError(f"{path}:{line}: {key.value}: expected its options as `key: value` lines, got a list")
    return path


def _refuse_duplicates(node: yaml.Node, path: Path, parent: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, parent)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first:
            raise InputError(f"{path}:{line}: {parent}{name} is given twice (first in line {first[name]}); remove one")
        first[name] = line
        _refuse_duplicates(value, path, f"{parent}{name}.")


def no_module(arguments: Sequence[str]) -> InputError:
    """The error if neither a config nor an option names a module."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = argument.partition("=")[0] if argument.startswith("--") else before
        is_value = option == "--config" or "." in option  # the file belongs to an option, such as --data.path
        if argument.endswith((".yaml", ".yml")) and not is_value:
            return InputError(f"no module is chosen; did you mean --config {argument.rpartition('=')[2]}?")
    stages = ", ".join(name for name in shipped_configs() if "/" not in name)
    return InputError(f"no module is chosen; add --config NAME (shipped: {stages}) or --model PPOModule")
