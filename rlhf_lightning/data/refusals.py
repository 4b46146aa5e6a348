"""Refused rows, by their cause: one line tells how many there are, and where the first stands."""

from __future__ import annotations

import re

from rlhf_lightning.errors import InputError

ACCEPTED = "; data check lists the accepted forms"  # ends a message about a row of which no key is known


class Refusals:
    """Errors of rows, counted by what they say whatever the row."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: dict[str, int] = {}

    def __len__(self) -> int:
        """Rows."""
        return sum(self._count.values())

    def add(self, error: InputError | str) -> None:
        """Counts one."""
        cause = _cause(str(error))
        self._first.setdefault(cause, str(error))
        self._count[cause] = self._count.get(cause, 0) + 1

    def causes(self) -> list[tuple[str, int]]:
        """The first message of each cause with the number of rows, in the order of the first rows."""
        return [(message, self._count[cause]) for cause, message in self._first.items()]

    def error(self, rows: int) -> InputError:
        """The first cause; of more than one refused row, how many there are.

        Args:
            rows: how many were read.
        """
        message, count = self.causes()[0]
        if len(self) == 1:
            return InputError(message)
        others = len(self) - count
        more = f"; {others:,} rows are refused for other causes, see data check" if others else ""
        problem, accepted, _ = message.partition(ACCEPTED)
        return InputError(f"{problem} ({count:,} of {rows:,} rows have this{more}){accepted}")


def _cause(message: str) -> str:
    """The message without what differs from row to row: the line, positions, numbers, cells, and other keys."""
    _, key, problem = message.partition(": key '")
    text = key + problem if key else re.sub(r"^.*?:\d+: ", "", message)
    text = re.sub(r"keys found: [^;]*", "", text.partition(ACCEPTED)[0])
    text = re.sub(r"got ('.*?'|\".*?\")", "got", text)
    return re.sub(r"\d+", "#", text)
