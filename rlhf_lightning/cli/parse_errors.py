"""Turns the argument parser's report into one line: the place, what is wrong, and the nearest valid name.

jsonargparse reports an error as a nested text of many lines, with every type of a union. The text is regular: each
level begins with ``Parser key "x":`` or ``Problem with given class_path 'c':``, and the innermost line is the cause.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_lightning.cli.configs import keys_with_lines
from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError
from rlhf_lightning.options import WORDS, Options

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(
    r"(?:Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: (.+))"
)
_GROUP = re.compile(r"Group '([^']+)' does not accept option")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_RESTRICTION = re.compile(r"Not of type (\w+): (.+?) does not conform to restriction (.+)")
_EXPECTED = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[([^\]]+)\])|Not of type (\w+)")
_GOT = re.compile(r"(?:Got value|Given value): (.*)")
_NOT_A_NUMBER = re.compile(r"Not of type \w+: .*: ('.*?'|.+)$", re.M)
_NO_VALUE = re.compile(r"argument (--[\w.]+).*: expected one argument")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_NO_OPTION = re.compile(r"Invalid option \"(.*)\" for (--print_\w+)")
# Reasons why a class cannot be imported. The second group of the first pattern is the text of any exception.
_BROKEN_CLASS = re.compile(
    r"Problem with given class_path '([^']+)':\n\s+(?!\s|Parser key|Option |unrecognized|the following)(\S.*)"
)
_NO_ATTRIBUTE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_NO_CLASS_FILE = re.compile(r"Invalid content in sub-config file (.+?): ")
_PATHS = {"model": "model", "model.reward": "path", "data": "path"}  # by place of a class: its option for a path
_DATA = (".jsonl", ".json", ".csv", ".parquet", ".gz")
_OTHER_BASE = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
_NOT_A_CLASS = re.compile(r"Not a valid subclass of (\w+)")
_NO_CONFIG = re.compile(r"Unable to load config '([^']*)'")
_BASE = re.compile(r"Subtypes: \[<class '(?:\w+\.)*(\w+)'>")
_INSIDE = re.compile(r"NestedArg\(key='([^']+)'")
_TIGHT_COLON = re.compile(r"\{.*\w:\S.*\}")  # YAML reads `{a:1}` as one long key
_COMPARED = re.compile(r"\bv(?=[<>=])")
_MAX_LENGTH = 400


def explain(
    message: str,
    arguments: Sequence[str],
    paths: Sequence[Path],
    accepted: Callable[[str | None], Sequence[str]],
) -> str:
    """One line for a parser's report: the place, what is wrong, and what to do.

    Args:
        message: the report.
        arguments: the command line.
        paths: the config files, in the order given (a later one wins).
        accepted: returns the valid dotted keys of the class with the given name, or of the whole command for None.
    """
    keys = _chain(message)
    classes: list[str] = _CLASS.findall(message)
    bases = ("lightning.Callback", "lightning.pytorch.callbacks.Callback")  # tried last, after the right class
    classes = [name for name in classes if name not in bases] or classes
    flag = _NO_OPTION.search(message)
    if flag:
        return f"{flag[2]}={flag[1]}: no such flag; there are skip_default and skip_unset"
    unknown = _UNKNOWN.search(message)
    if unknown:
        return _explain_unknown(unknown, keys, classes, arguments, paths, accepted)
    required = _REQUIRED.search(message)
    if required:
        names = [".".join([*keys, name.strip()]) for name in required[1].split(",")]
        names = [name.removeprefix(f"{arguments[0]}.") for name in names]  # with --model null the subcommand is a key
        of = f" by {classes[-1].rsplit('.', 1)[-1]}" if classes else ""
        return f"{' and '.join(names)}: required{of} but not given; add --{names[0]} VALUE or write it in the config"
    key = ".".join(keys)
    place = _place(key, arguments, paths) or next((word for word in arguments if word.endswith(".help")), "")
    restriction = _RESTRICTION.search(message)
    if restriction:
        kind, value, rule = restriction.groups()
        return f"{place}: expected {WORDS.get(kind) or _COMPARED.sub('a value ', rule)}, got {value}"
    of_class = _explain_class(message, place, key, accepted)
    if of_class:
        return of_class
    no_value = _NO_VALUE.search(message)
    if no_value:
        return f"{_without_value(no_value[1], arguments)}: a value must follow"
    cause = _innermost(message)
    expected = [kind or literal.replace(", ", " or ") or name for kind, literal, name in _EXPECTED.findall(cause)]
    expected = [kind for kind in dict.fromkeys(expected) if kind != "NoneType"]
    got = _GOT.search(cause) or _NOT_A_NUMBER.search(cause)
    if expected and got:
        value = got[1].strip(chr(39)) or "nothing"
        advice = "; write a space behind each colon" if _TIGHT_COLON.fullmatch(value) and "dict" in expected else ""
        told = dict.fromkeys(WORDS.get(kind, kind) for kind in expected)
        return f"{place}: expected {' or '.join(told)}, got {value}{advice}"
    return f"{place}: {_shortened(message)}" if place else _shortened(message)


def refusal(error: BaseException, module: type) -> InputError | None:
    """The `InputError` that the parser has wrapped, with options in place of constructors' arguments; None if none.

    ``AdamWOptions.eps: ...`` becomes ``model.optimizer.eps: ...``.
    """
    link: BaseException | None = error
    while link is not None and not isinstance(link, InputError):
        link = link.__cause__ or link.__context__
    if link is None:
        return None
    parameters = inspect.signature(module).parameters.values()
    places = {type(p.default).__name__: f"model.{p.name}" for p in parameters if isinstance(p.default, Options)}
    name, dot, rest = str(link).partition(".")
    place = {**places, module.__name__: "model"}.get(name, name)
    return InputError(f"{place}{dot}{rest}")


def _explain_class(message: str, place: str, key: str, accepted: Callable[[str | None], Sequence[str]]) -> str | None:
    """The line about the class at a place; None if the error is about something else."""
    bases = _BASE.findall(message)
    base = bases[-1] if bases else "class"
    known = accepted("classes")
    if (option := _PATHS.get(plain := key.replace(".init_args", ""))) and (path := _path_for_class(message)):
        return f"{place}: {path} is a path, and the name of a {base} is expected; write --{plain}.{option} {path}"
    if (found := _NO_CLASS.search(message)) is not None:
        name = found[1].strip()
        if name in known:
            return f"{place}: {name} is no {base}; name one that is"
        hint = did_you_mean(name, known)
        return f"{place}: no class {name!r} is known{hint}; give its full path, package.module.Class"
    if (found := _OTHER_BASE.search(message)) is not None:
        return f"{place}: {found[1]} is no {found[2]}; name a class that is"
    if (found := _BROKEN_CLASS.search(message)) is not None:
        path, cause = found[1], found[2].strip()
        attribute, module = _NO_ATTRIBUTE.search(cause), _NO_MODULE.search(cause)
        if attribute or module:
            package = path.rpartition(".")[0]
            hint = did_you_mean(path.rsplit(".", 1)[-1], known) if path.startswith("rlhf") else ""
            what = f"{attribute[1]} has no {attribute[2]}" if attribute else f"there is no module {module[1]}"  # type: ignore[index]
            more = "" if hint else "; check the spelling, and that it is installed or lies in this folder"
            return f"{place}: no class {path!r}: {what if attribute or module else package}{hint}{more}"
        if "object has no attribute 'keys'" in cause:
            return f"{place}: its init_args are expected as `key: value` lines"
        return f"{place}: {path} cannot be used: {cause}; repair it, or name another class"
    if (found := _INSIDE.search(message)) is not None and "is abstract" in message:
        return f"--{key}.{found[1]}: no class is chosen for {key}; add --{key} CLASS"
    if (found := _NOT_A_CLASS.search(message)) is not None:
        got = _GOT.search(message)
        return (
            f"{place}: expected the name of a {found[1]} and its init_args, got {got[1] if got else 'something else'}"
        )
    if (found := _NO_CONFIG.search(message)) is not None:
        parts = key.replace(".init_args", "").split(".")
        plain = ".".join(parts[:-1] if parts[-2:-1] == parts[-1:] else parts)  # the report names a group twice
        options = [f"--{name}" for name in accepted(None) if name.startswith(f"{plain}.")]
        several = f"--{plain}.OPTION VALUE" if not options else f"{options[0]} VALUE"
        return f"--{plain}: {found[1]} is no config file, and a group of options is expected; write {several}"
    return None


def _path_for_class(message: str) -> str:
    """The path that was given in place of a class, even if nothing is there; empty if the value is no path."""
    found = _NO_CLASS.search(message) or _BROKEN_CLASS.search(message) or _NO_CLASS_FILE.search(message)
    name = found[1].strip() if found else ""
    looks = ("/" in name and ".py" not in name) or name.lower().endswith(_DATA)
    return name if name and (looks or Path(name).exists()) else ""


def _explain_unknown(
    found: re.Match[str],
    keys: list[str],
    classes: list[str],
    arguments: Sequence[str],
    paths: Sequence[Path],
    accepted: Callable[[str | None], Sequence[str]],
) -> str:
    nested, top, rest = found.groups()
    if classes and top is not None:  # an option in a group of the class
        group = _GROUP.search(found.string)
        nested = f"{group[1]}.{top}" if group else top
    if rest:
        name = next((word for word in rest.split() if word.startswith("--")), rest.split()[0])
        if not name.startswith("-"):
            return (
                f"{name}: this argument belongs to no option; options are written --key value{_list(name, arguments)}"
            )
        name = ".".join([*keys, name.lstrip("-").partition("=")[0]])
        valid = [".".join([*keys, key]) for key in accepted(classes[-1])] if classes else accepted(None)
        return f"--{name}: unknown key{did_you_mean(name, valid, '--')}"
    key = ".".join([*keys, nested]) if nested else top
    place = _place(key, arguments, paths)
    if not classes:
        return f"{place}: unknown key{did_you_mean(key, accepted(None), '--')}"
    if nested == "class_path":
        return f"{place}: what stands beside class_path belongs under init_args; move it there"
    if classes[-1].endswith(".Callback"):
        return f"--{key}: no callback is chosen; add --{'.'.join(keys)}+=CLASS before it"
    valid = accepted(classes[-1])
    if not valid:
        part = ".".join(keys)
        return f"{place}: no class is chosen for {part}; add --{part} CLASS before it"
    hint = did_you_mean(nested.rsplit(".", 1)[-1], valid, f"--{'.'.join(keys)}.")
    hint = hint or f"; its keys are {', '.join(valid)}"
    return f"{place}: unknown key of {classes[-1].rsplit('.', 1)[-1]}{hint}"


def _list(word: str, arguments: Sequence[str]) -> str:
    """How to write a list, if the word follows an option that has a value already."""
    place = arguments.index(word) if word in arguments else 0
    values: list[str] = []
    for argument in reversed(arguments[:place]):
        if argument.startswith("--"):
            option, _, value = argument.partition("=")
            values = [*([value] if value else []), *values, word]
            return f", and a list {option} '[{', '.join(values)}]'" if len(values) > 1 else ""
        values.insert(0, argument)
    return ""


def _chain(message: str) -> list[str]:
    """The keys from the outermost to the one at fault. Each is indented deeper than the one before.

    A first key ``config`` is left out: the parser reports it for values that the command line sets in their own layer.
    """
    keys: list[str] = []
    depth = -1
    for line in message.splitlines():
        found = _KEY.search(line)
        if found and found.start() > depth:
            keys.append(found[1])
            depth = found.start()
    return keys[1:] if keys[:1] == ["config"] else keys


def _innermost(message: str) -> str:
    """The lines of the report under its last and deepest key."""
    lines = message.splitlines()
    keys = [(found.start(), number) for number, line in enumerate(lines) if (found := _KEY.search(line))]
    depth, start = max(keys, default=(-1, -1))
    under = []
    for line in lines[start + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= depth:
            break
        under.append(line)
    return "\n".join(under)


def _without_value(option: str, arguments: Sequence[str]) -> str:
    """The argument that begins with ``option`` and lacks a value. The parser names only the first part of it."""
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith(option) and "=" not in argument and following.startswith("--"):
            return argument
    return option


def _place(key: str, arguments: Sequence[str], paths: Sequence[Path]) -> str:
    """``--key`` if it was given on the command line, else ``file:line: key`` if a config has it, else the key alone."""
    plain = key.replace(".init_args", "")
    options = [argument.partition("=")[0].rstrip("+").replace(".init_args", "") for argument in arguments]
    if f"--{plain}" in options:
        return f"--{plain}"
    if f"--{plain}.class_path" in options:
        return f"--{plain}.class_path"
    for path in reversed(paths):
        for name, line in keys_with_lines(path):
            if name == plain:
                return f"{path}:{line}: {plain}"
    return plain


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _MAX_LENGTH else line[: _MAX_LENGTH - 3] + "..."
