"""Answers that a stopped command has sampled already: a file beside the output, which the same command goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from rlhf_lightning.errors import InputError
from rlhf_lightning.outputs import lock

_HEAD = b'{"options": '


class Place(NamedTuple):
    """The place of one answer."""

    policy: str
    number: int  # of the policy's answers to the prompt, from 0
    row: int  # number of the prompt in all files together


class PartialAnswers:
    """The answers of a command that may be stopped at any moment.

    The first line of the file has the options that change answers. Every other line has one answer. Lines are added a
    batch at a time, and are on the disk before the next batch begins. A last line without an end is cut off. A file
    without answers is removed at the end, so that a command that is refused leaves nothing.

    Args:
        path: the file; it is made if there is none.
        options: what the answers depend on, in JSON's types.

    Raises:
        InputError: another process has the file, it belongs to other options, or a line of it is no answer.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path = path
        self.texts: dict[Place, str] = {}
        self._options = options
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._lock = lock(path)
        try:
            if self._lock is None:
                raise InputError(f"{path}: another process writes to this file; wait for it, or name another --out")
            self._read()
        except BaseException:
            self._file.close()
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, answers: Mapping[Place, str]) -> None:
        """Adds a batch of answers. They are on the disk when it returns."""
        first = [] if self.texts else [{"options": self._options}]
        self._append(first + [{**place._asdict(), "text": text} for place, text in answers.items()])
        self.texts.update(answers)

    def close(self) -> None:
        """Closes the file and lets other processes have it."""
        self._file.close()
        if not self.texts:
            self.path.unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        while data:  # an unbuffered write may take a part
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        if not content.startswith(_HEAD[: len(content)]):
            raise self._unknown(1)
        *lines, torn = content.split(b"\n")  # not splitlines(): texts may hold U+2028
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        if len(lines) < 2:  # without an answer
            self._file.truncate(0)
            return
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                if number == 1:
                    self._check(values["options"])
                else:
                    self.texts[Place(values["policy"], values["number"], values["row"])] = values["text"]
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise self._unknown(number) from None

    def _unknown(self, number: int) -> InputError:
        return InputError(
            f"{self.path}:{number}: is not a line of a stopped command's answers; delete the file to begin anew"
        )

    def _check(self, old: Mapping[str, Any]) -> None:
        new = self._options
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            changes = ", ".join(f"{name} was {old.get(name)}, now {new.get(name)}" for name in names)
            raise InputError(
                f"{self.path}: a stopped command with other options left these answers ({changes}); give its options "
                "to go on, or delete the file"
            )
