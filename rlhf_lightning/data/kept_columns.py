"""Writes rows again beside what was made of them: prompts as they were read, and other columns under free names."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Collection, Mapping
from typing import Any

from rlhf_lightning.data.rows import Record
from rlhf_lightning.errors import InputError


def prompt_value(record: Record) -> Any:
    """The prompt in JSON's types: a text, or a list of messages."""
    return record.prompt if isinstance(record.prompt, str) else [message.turn() for message in record.prompt]


def free_names(columns: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """The name in the file for each column: its own, or with ``input_`` before it if that is one of ``taken``."""
    names: dict[str, str] = {}
    for name in sorted(columns):
        new = name
        while new in taken or (new != name and new in columns):
            new = f"input_{new}"
        names[name] = new
    return names


def written(record: Record, columns: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Columns of a record in JSON's types, under their names in the file, see `free_names`.

    Raises:
        InputError: a column holds a value that JSON cannot express.
    """
    found: dict[str, Any] = {}
    for name, value in columns.items():
        try:
            found[names[name]] = plain(value)
        except TypeError as error:
            raise InputError(
                f"{record.where}: key '{name}': holds {error}, which has no place in JSON; leave the column out"
            ) from None
    return found


def plain(value: Any) -> Any:
    """The value in JSON's types: dates and decimals of Parquet files become text, NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(type(value).__name__)
