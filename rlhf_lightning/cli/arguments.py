"""Sorts the words of the command line, so that the order in which options are typed changes nothing.

The parser works from left to right. It would parse an option that stands before its class against another class, and
keep that class's defaults. So configs go first, then options that name a class, then the options of that class. If an
option is given twice, the later value wins; if two configs set the same key, the later config wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"-\.?\d")
_PRINTS = ("comments", "skip_default", "skip_null", "skip_unset")


@dataclass(frozen=True)
class Option:
    """One option as typed.

    Args:
        key: its name without dashes, ``init_args`` and ``class_path``: ``model.lora.rank``, or ``model`` for a class.
        value: the value that was given; None if there was none.
        tokens: its words on the command line.
    """

    key: str
    value: str | None
    tokens: tuple[str, ...]

    @property
    def appends(self) -> bool:
        """Whether the option adds to a list (``--trainer.callbacks+=EarlyStopping``)."""
        return self.key.endswith("+")


def split(arguments: Sequence[str]) -> list[Option]:
    """The options of a command line without its subcommand. A word that belongs to no option has an empty key."""
    options: list[Option] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not _is_option(word):
            options.append(Option("", word, (word,)))
            continue
        name, equals, value = word.partition("=")
        if name == "--print_config":
            if not equals and waiting and set(waiting[0].split(",")) <= set(_PRINTS):
                value = waiting.pop(0)
            options.append(Option("print_config", value or None, (f"{name}={value}" if value else name,)))
        elif equals:
            options.append(Option(_key(name), value, (word,)))
        elif waiting and not _is_option(waiting[0]) and name not in ("-h", "--help"):
            options.append(Option(_key(name), waiting[0], (word, waiting.pop(0))))
        else:
            options.append(Option(_key(name), None, (word,)))
    return options


def ordered(options: Sequence[Option]) -> list[Option]:
    """Configs first, then options by the depth of their keys, else as typed; of repeated options only the last.

    An option that adds to a list keeps its place among the options inside that list: they set the item added last.
    """
    lists = {option.key[:-1] for option in options if option.appends}
    effective = list(_without_repeats(options, lists))

    def rank(option: Option) -> tuple[int, int]:
        if option.key == "config":
            return 0, 0
        if not option.key:
            return 2, 0
        inside = next((name for name in lists if f"{option.key.rstrip('+')}.".startswith(f"{name}.")), None)
        return 1, (option.key if inside is None else inside).count(".")

    return sorted(effective, key=rank)


def repeats(options: Sequence[Option]) -> list[Option]:
    """The options that are given again later, and so have no effect."""
    lists = {option.key[:-1] for option in options if option.appends}
    effective = {id(option) for option in _without_repeats(options, lists)}
    return [option for option in options if id(option) not in effective]


def _without_repeats(options: Sequence[Option], lists: set[str]) -> Iterator[Option]:
    last = {option.key: number for number, option in enumerate(options)}
    for number, option in enumerate(options):
        several = (
            option.key in ("", "config")
            or option.value is None
            or any(f"{option.key.rstrip('+')}.".startswith(f"{name}.") for name in lists)
        )
        if several or last[option.key] == number:
            yield option


def _is_option(word: str) -> bool:
    return len(word) > 1 and word.startswith("-") and " " not in word.partition("=")[0] and not _NUMBER.match(word)


def _key(name: str) -> str:
    if name == "-c":
        return "config"
    parts = name.lstrip("-").split(".")
    parts = [part for part in parts if part not in ("init_args", "init_args+")]
    return ".".join(parts[:-1] if parts[-1] == "class_path" and len(parts) > 1 else parts)
