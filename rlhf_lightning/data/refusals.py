"""Groups refused rows by cause. One line then names the first row and the number of rows with the same cause."""

from __future__ import annotations

import re

from rlhf_lightning.errors import InputError

ACCEPTED = "; data check lists the accepted forms"  # the end of a message about a row without a known key


class Refusals:
    """The errors of refused rows, counted by cause."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: dict[str, int] = {}

    def __len__(self) -> int:
        """The number of refused rows."""
        return sum(self._count.values())

    def add(self, error: InputError | str) -> None:
        """Counts one refused row."""
        cause = _cause(str(error))
        self._first.setdefault(cause, str(error))
        self._count[cause] = self._count.get(cause, 0) + 1

    def causes(self) -> list[tuple[str, int]]:
        """The first message of each cause with its number of rows, in the order in which the causes came up."""
        return [(message, self._count[cause]) for cause, message in self._first.items()]

    def error(self, rows: int) -> InputError:
        """The error of the first cause, with the number of refused rows if there are several.

        Args:
            rows: the number of rows that were read.
        """
        message, count = self.causes()[0]
        if len(self) == 1:
            return InputError(message)
        others = len(self) - count
        more = f"; {others:,} rows are refused for other causes, see data check" if others else ""
        problem, accepted, _ = message.partition(ACCEPTED)
        return InputError(f"{problem} ({count:,} of {rows:,} rows have this{more}){accepted}")


def _cause(message: str) -> str:
    """The message without the parts that differ from row to row: the line, positions, numbers, cells, other keys."""
    _, key, problem = message.partition(": key '")
    text = key + problem if key else re.sub(r"^.*?:\d+: ", "", message)
    text = re.sub(r"keys found: [^;]*", "", text.partition(ACCEPTED)[0])
    text = re.sub(r"got ('.*?'|\".*?\")", "got", text)
    return re.sub(r"\d+", "#", text)
