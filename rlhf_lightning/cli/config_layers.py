"""Merges configs and the command line in layers, and names the final class of each section in every layer.

The parser gives a section the defaults of the first class that it meets there, and keeps them when another class
follows: with ``lora.yaml`` before ``ppo.yaml``, PPO would get the base class's learning rate. So every layer names the
final class before the parser sees it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from rlhf_lightning.cli.arguments import Option

_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_SURELY_A_CLASS = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*")  # ``rows.jsonl`` is a dotted name, but a file
_SECTIONS = ("model", "data")  # sections whose value is always a class
Place = tuple[str, ...]
Resolve = Callable[[str], "type | None"]
Keys = Callable[[type], Sequence[str]]


@dataclass
class Layer:
    """One config on its way to the parser.

    Args:
        path: its file; None for values that the command line sets.
        content: its sections.
        changed: whether the content differs from the file.
    """

    path: Path | None
    content: dict[str, Any]
    changed: bool = False

    @property
    def argument(self) -> str:
        """The value for ``--config``: the path, or the content as YAML if it was changed."""
        return str(self.path) if self.path and not self.changed else yaml.safe_dump(self.content, sort_keys=False)

    @property
    def name(self) -> str:
        return "the command line" if self.path is None else self.path.name


@dataclass
class Layers:
    """The merged configs and options of a command line.

    Args:
        layers: the configs, the lowest first.
        options: the rest of the command line, in order.
        notes: one line for each value that was left out, or that wins though it was typed first.
        classes: the class of each place that has one, as it is written.
    """

    layers: list[Layer]
    options: list[Option]
    notes: list[str] = field(default_factory=list)
    classes: dict[Place, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The command line for the parser, without its subcommand."""
        configs = [word for layer in self.layers for word in ("--config", layer.argument)]
        return [*configs, *(word for option in self.options for word in option.tokens)]

    def given(self, place: Place) -> list[tuple[Layer, Any]]:
        """Every value that is set at the place, and its layer. The last one wins."""
        typed = [Layer(None, _nested(option.key.split("."), _value(option.value))) for option in self.options]
        every = [*self.layers, *typed]
        return [(layer, value) for layer in every for at, value in _leaves(layer.content) if at == place]


def lay(paths: Sequence[Path], options: Sequence[Option], resolve: Resolve, keys: Keys) -> Layers:
    """Brings configs and options into an order that does not depend on how they were typed.

    Configs that name the module are the lowest layers; the others follow in the order typed. A value ``null`` on the
    command line becomes a layer of its own, because the parser turns some of them into the text 'None'.

    Args:
        paths: the configs as typed.
        options: the other options, see `arguments.ordered`.
        resolve: returns the class of a name, or None if it cannot be imported.
        keys: returns the options of a class.
    """
    typed = [Layer(path, get_loader("yaml")(path.read_text(encoding="utf-8")) or {}) for path in paths]
    layers = sorted(typed, key=lambda layer: _class_of(layer.content.get("model")) is None)
    result = Layers(layers, list(options))
    result.notes += _reordered(typed, layers)
    lists = tuple(f"{option.key[:-1]}." for option in options if option.appends)
    nulls = [o for o in options if o.value == "null" and not o.appends and not (lists and o.key.startswith(lists))]
    if nulls:
        content: dict[str, Any] = {}
        for option in nulls:
            _set_null(content, option.key.split("."))
        result.layers.append(Layer(None, content, changed=True))
        result.options = [option for option in options if option not in nulls]
    result.classes = _classes(result)
    for place in sorted(result.classes, key=len):
        below = None  # the class that a layer without one is written for
        for layer in result.layers:
            below = _class_of(_find(layer.content, place)[0]) or below
            _name_class(layer, place, below, result, resolve, keys)
    return result


def _reordered(typed: Sequence[Layer], layers: Sequence[Layer]) -> Iterator[str]:
    """A note for each value that was typed first but wins, because its config is a higher layer."""
    for number, over in enumerate(typed):
        values = dict(_leaves(over.content))
        for under in typed[number + 1 :]:
            if layers.index(under) > layers.index(over):
                continue
            for place, value in _leaves(under.content):
                if place in values and values[place] != value:
                    yield (
                        f"{'.'.join(place)}: {values[place]} of {over.name} wins over {value} of {under.name}, "
                        "which names the module"
                    )


def _classes(result: Layers) -> dict[Place, str]:
    """The final class of every place where a class is named."""
    classes: dict[Place, str] = {}
    sections: set[Place] = set()
    for layer in result.layers:
        for place, node in _mappings(layer.content):
            sections.add(place)
            if (name := _class_of(node)) is not None:
                classes[place] = name
    typed = [tuple(option.key.split(".")) for option in result.options]
    inside = {place[:depth] for place in typed for depth in range(1, len(place))}  # places with options inside
    for place, option in zip(typed, result.options, strict=True):
        given = _value(option.value)
        name = _class_of(given)
        if name is None or option.appends:
            continue
        sure = isinstance(given, dict) or _SURELY_A_CLASS.fullmatch(name) is not None
        if place in {(section,) for section in _SECTIONS} or (sure and place in classes.keys() | sections | inside):
            classes[place] = name
    return classes


def _name_class(layer: Layer, place: Place, below: str | None, result: Layers, resolve: Resolve, keys: Keys) -> None:
    """Writes the final class into the layer's section at ``place``, which was written for the class ``below``."""
    node, parent, key = _find(layer.content, place)
    name, written = result.classes[place], _class_of(node)
    if written == name or not (isinstance(node, dict) or written):
        return
    if not layer.changed:
        layer.content, layer.changed = copy.deepcopy(layer.content), True
        node, parent, key = _find(layer.content, place)
    section: dict[str, Any] = node if isinstance(node, dict) else {"class_path": written}
    wrapped = "class_path" in section or "init_args" in section
    arguments = (section.get("init_args") or {}) if wrapped else section
    before, after = (resolve(below) if below else None), resolve(name)
    if before is not None and after is not None and before is not after:
        # An option that the first class lacks, too, is a mistake. The parser will report it.
        arguments, gone = _without(arguments, set(keys(before)) - set(keys(after)))
        for argument in gone:
            result.notes.append(
                f"{'.'.join((*place, argument))} of {layer.name} is left out: {after.__name__}, which replaces "
                f"{before.__name__}, has no such option"
            )
    more = {k: v for k, v in section.items() if k not in ("class_path", "init_args")} if wrapped else {}
    parent[key] = {"class_path": name, "init_args": arguments, **more}


def _without(arguments: dict[str, Any], gone: Collection[str], at: str = "") -> tuple[dict[str, Any], list[str]]:
    """The options without those whose dotted keys are in ``gone``, and the removed keys. Drops groups left empty."""
    rest: dict[str, Any] = {}
    removed: list[str] = []
    for name, value in arguments.items():
        key = f"{at}{name}"
        if key in gone:
            removed.append(key)
        elif isinstance(value, dict) and any(other.startswith(f"{key}.") for other in gone):
            inner, dropped = _without(value, gone, f"{key}.")
            removed += dropped
            if inner or not dropped:
                rest[name] = inner
        else:
            rest[name] = value
    return rest, removed


def _find(content: dict[str, Any], place: Place) -> tuple[Any, dict[str, Any], str]:
    """The value at the place (None if there is none), the mapping that holds it, and its key in that mapping."""
    parent: dict[str, Any] = content
    for key in place[:-1]:
        inner = parent.get(key)
        if not isinstance(inner, dict):
            return None, {}, ""
        parent = inner["init_args"] if isinstance(inner.get("init_args"), dict) else inner
    return parent.get(place[-1]), parent, place[-1]


def _mappings(content: dict[str, Any], at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every section with its place, without ``init_args`` in it; also class names in place of ``model`` or ``data``."""
    for key, value in content.items():
        place = (*at, str(key))
        if isinstance(value, dict):
            yield place, value
            inner = value.get("init_args") if isinstance(value.get("init_args"), dict) else value
            yield from _mappings(inner or {}, place)
        elif place in {(section,) for section in _SECTIONS}:
            yield place, value


def _leaves(content: dict[str, Any], at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value with its place. A ``class_path`` is the value of its section."""
    for key, value in content.items():
        place = at if key in ("init_args", "class_path") else (*at, str(key))
        if isinstance(value, dict):
            yield from _leaves(value, place)
        else:
            yield place, value


def _class_of(node: Any) -> str | None:
    if isinstance(node, dict):
        node = node.get("class_path")
    return node if isinstance(node, str) and _CLASS.fullmatch(node) and node != "null" else None


def _set_null(content: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if content is None:  # the group itself is null already
            return
    content[keys[-1]] = None


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: value if len(keys) == 1 else _nested(keys[1:], value)}


def _value(text: str | None) -> Any:
    try:
        return None if text is None else get_loader("yaml")(text)
    except yaml.YAMLError:
        return text
