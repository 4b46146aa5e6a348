"""Renames the user's columns to the keys that forms read, as ``{"prompt": "question"}`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_lightning.data.files import RawRow, shown
from rlhf_lightning.data.hints import COLUMNS
from rlhf_lightning.data.values import refused
from rlhf_lightning.errors import InputError
from rlhf_lightning.text import nearest

# The keys that forms read. Any other name is a column for reward functions, unless it looks like a misspelt key.
KEYS = (
    *("prompt", "completion", "chosen", "rejected", "completions", "ranks", "ratings", "messages", "conversations"),
    *(
        "question",
        "response_j",
        "response_k",
        "preferred_output",
        "non_preferred_output",
        "instruction",
        "input",
        "output",
        "response",
        "context",
        "text",
    ),
    *("label", "margin", "preference", "weight", "system", "tools", "history", "instances"),
)


def columns_of(pairs: Sequence[str]) -> dict[str, str]:
    """Parses the names on a command line, ``OURS=YOURS`` each.

    Raises:
        InputError: a pair is not of that form.
    """
    columns = {}
    for pair in pairs:
        name, _, given = pair.partition("=")
        if not name or not given:
            raise InputError(f"--columns {pair}: write our name, =, and your name, as in prompt=question")
        columns[name] = given
    return columns


class Columns:
    """Renames the user's columns in rows to our keys, and remembers which of these columns no row had.

    Args:
        names: maps each of our keys to the user's column.
        option: the option that gives the names, for messages.

    Raises:
        InputError: a key that no form has looks like a misspelt key of a form.
    """

    def __init__(self, names: Mapping[str, str] | None, option: str = COLUMNS) -> None:
        self.names = dict(names or {})
        self.option = option
        for name in self.names:
            near = nearest(name, KEYS, cutoff=0.8)
            if name not in KEYS and near:
                raise InputError(f"{option}: '{shown(name)}': no form of rows has this key; did you mean {near}?")
        self._found: set[str] = set()
        self._keys: dict[str, None] = {}  # the keys that rows had, in order

    def renamed(self, row: RawRow) -> RawRow:
        """The row under our names. A column that the row lacks is not added."""
        given = {name: row[key] for name, key in self.names.items() if key in row}
        taken = set(self.names.values())
        return {**{key: value for key, value in row.items() if key not in taken}, **given} if given else row

    def apply(self, row: RawRow, where: str) -> RawRow:
        """Renames as `renamed` does, and notes the row's keys for `check`.

        Raises:
            InputError: the row has both our key and the user's column that is to be read as it.
        """
        if not self.names:
            return row
        taken = set(self.names.values())
        for name, key in self.names.items():
            if key in row and name in row and name not in taken:
                problem = f"stands beside '{shown(key)}', which {self.option} puts in its place; keep one of the two"
                raise refused(where, name, problem)
        self._found.update(key for key in taken if key in row)
        self._keys.update(dict.fromkeys(row))
        return self.renamed(row)

    def check(self) -> None:
        """Refuses a column that no row had.

        Raises:
            InputError: names the nearest key that rows had.
        """
        for name, key in self.names.items():
            if key not in self._found and self._keys:
                near = nearest(key, self._keys)
                hint = f"; did you mean {shown(near)}?" if near else ""
                found = ", ".join(map(shown, self._keys))
                problem = f"no row has a key '{shown(key)}' for '{shown(name)}'"
                raise InputError(f"{self.option}: {problem}{hint or ';'} keys found: {found}")
