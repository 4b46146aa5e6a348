"""The two ways a run can end badly, told apart so that the command line can answer with the right exit code."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn, get_args

from rlhf_lightning.text import nearest


class InputError(ValueError):
    """The user's input is at fault: a file, a row, a key, a value, an option.

    The message is one line that says what was wrong, where (file, line, key, or option), and what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite. Raised before the optimizer step, so saved checkpoints stay finite.

    The command line prints it without a traceback and exits with code 1.
    """


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a ``Literal``'s.

    Args:
        name: of the option, for the message.
        value: what was given.
        choices: the ``Literal``, of two values or more.

    Raises: InputError with the value and the choices.
    """
    *others, last = get_args(choices)
    if value not in (*others, last):
        raise InputError(f"{name}: expected {', '.join(others)} or {last}, got {value!r}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch got no memory. On a GPU that is a class of its own; on the CPU the words of a RuntimeError tell."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises `InputError` in one line where the plain one prints its usage and exits.

    Options are written in full: a shortened one that works today means another one tomorrow.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the plain one; what was given is kept for `error`."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise; an unknown option comes with the nearest known one.

        It comes first too where something required is missing: often that is the same option, spelt rightly.
        """
        names = [word.partition("=")[0] for word in self._given if word.startswith("--")]
        unknown = [name for name in names if name not in self._option_string_actions]
        if unknown and not message.startswith("unrecognized arguments"):
            message = f"unrecognized arguments: {' '.join(unknown)} ({message})"
        name = unknown[0] if unknown else ""
        near = nearest(name, self._option_string_actions)
        hint = f"did you mean {near}? " if near else ""
        raise InputError(f"{message}; {hint}{self.prog} --help lists the options")
