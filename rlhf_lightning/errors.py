"""The errors that end a run with one line and an exit code, and a command parser that raises one of them."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn, get_args

from rlhf_lightning.text import nearest


class InputError(ValueError):
    """The user's input is at fault: a file, a row, a key, a value, an option.

    The message is one line that says where (file, line, key, or option), what was wrong, and what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite. Raised before the optimizer step, so saved checkpoints stay finite.

    The command line prints it without a traceback and exits with code 1.
    """


class ProcessFailed(RuntimeError):
    """Another process of the run failed, ended or stands still, so this one cannot go on.

    The command line prints it without a traceback and exits with code 1.
    """


class RolloutDropped(RuntimeError):
    """The run is to stop, and a rollout is not worth waiting for: the responses that are drawn so far are dropped.

    It ends the batch at hand, which a resumed run draws again. `RunCheckpoint` raises and catches it.
    """


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuses a value that is not one of a ``Literal``'s.

    Args:
        name: the option's name, for the message.
        value: the given value.
        choices: the ``Literal``, with two values or more.

    Raises: InputError with the value and the choices.
    """
    *others, last = get_args(choices)
    if value not in (*others, last):
        raise InputError(f"{name}: expected {', '.join(others)} or {last}, got {value!r}")


def out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory: on a GPU that is an error class of its own, on the CPU certain words tell."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises a one-line `InputError` instead of printing its usage and exiting.

    Options must be written in full. A shortened option could mean another one in a later version.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as usual, and stores the arguments for `error`."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises the error. For an unknown option it names the nearest known one.

        Unknown options are reported before missing ones, since often a missing option is a misspelt one.
        """
        names = [word.partition("=")[0] for word in self._given if word.startswith("--")]
        unknown = [name for name in names if name not in self._option_string_actions]
        if unknown and not message.startswith("unrecognized arguments"):
            message = f"unrecognized arguments: {' '.join(unknown)} ({message})"
        name = unknown[0] if unknown else ""
        near = nearest(name, self._option_string_actions)
        hint = f"did you mean {near}? " if near else ""
        raise InputError(f"{message}; {hint}{self.prog} --help lists the options")
