"""A reward that is a Python function of text."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from typing import Literal

import torch
from torch import Tensor

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.rewards.base import Reward, as_scores, check_scores, quoted
from rlhf_lightning.rewards.process import CallFailed, FunctionProcess, call_here, load_function

OnError = Literal["raise", "skip"]


class FunctionReward(Reward):
    """Calls ``function(prompts, responses, **columns)``.

    Args:
        function: the function, as ``path/to/file.py:name`` or ``package.module:name``. The file is imported, which runs
            it, so name only code that you trust. It may import modules beside it.
        timeout: most seconds that one call may take. The function then runs in a process of its own, which imports the
            file again, and the rows' columns must be values that JSON can hold. None calls it in this process without a
            limit; a call that hangs then hangs the training.
        on_error: ``raise`` an error, or ``skip`` responses for which the function gives no finite number. Skipped ones
            count in no update and no mean, and ``reward/skipped`` counts them.

    The function gets two lists of B strings, the prompts as the user wrote them and the responses without special
    tokens. It also gets the rows' other columns by name, each a list of B. A function that names only some columns gets
    only those. A column with the name of one of the first two parameters cannot be passed, and is left out. The
    function returns B numbers: a list, an array or a tensor.

    With a timeout, the process is started once. If a call takes too long, the process is ended with all that it
    started, and the next call starts a new one. Data that the file loads is in memory twice.

    If a call fails, the function is called again with one response at a time, to name the response at fault or to skip
    only that one. The search for the response to name takes at most two more ``timeout``; skipping takes one for each
    response that hangs. So under ``skip`` a score should not depend on the other responses of the call.

    Raises: InputError if an option is wrong, the function cannot be found, or it needs a column that rows lack. Under
    ``raise`` also if it raises an error, takes too long, or returns something other than B finite numbers; the message
    names the function, the prompt and its row.
    """

    def __init__(self, function: str, timeout: float | None = None, on_error: OnError = "raise") -> None:
        super().__init__()
        if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
            raise InputError(f"reward timeout: expected seconds above 0, got {timeout}; null sets no limit")
        check_choice("reward on_error", on_error, OnError)
        self.source = function
        self.timeout = timeout
        self.may_skip = on_error == "skip"
        self.function = load_function(function)
        self._process = FunctionProcess(function)
        parameters = list(inspect.signature(self.function).parameters.values())
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._texts = {p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD}
        self._names = by_name - self._texts
        self._needed = sorted(p.name for p in parameters if p.name in self._names and p.default is p.empty)
        self._told = False  # whether the user was told why responses are skipped

    def forward(self, rollout: Rollout) -> Tensor:
        self._check_columns(rollout)
        try:
            scores = self._scores(rollout, list(range(len(rollout))), self.timeout)
        except CallFailed as error:
            if not self.may_skip:
                raise InputError(self._blame(rollout, str(error))) from error
            if not self._told:
                warnings.warn(
                    f"reward {self.source}: the function {error}; responses that it fails for are skipped", stacklevel=1
                )
            self._told = True
            scores = self._one_by_one(rollout)
        if self.may_skip:
            scores = torch.where(torch.isfinite(scores), scores, torch.nan)
        return check_scores(scores, rollout, self.source, self.may_skip)

    def _check_columns(self, rollout: Rollout) -> None:
        """Refuses rows without a column that the function needs. No call could work, so skipping would not help."""
        columns = rollout.prompts.columns
        if missing := [name for name in self._needed if name not in columns]:
            have = f"the rows have {', '.join(sorted(columns))}" if columns else "the rows have none beside the prompt"
            raise InputError(
                f"reward {self.source}: the function asks for column '{missing[0]}', and {have}; add it to the rows, "
                "map it with data.columns, or give the parameter a default"
            )

    def _scores(self, rollout: Rollout, rows: list[int], timeout: float | None) -> Tensor:
        """Calls the function for the given rows: ``[len(rows)]``. CallFailed says what the function did wrong."""
        columns = {
            name: values
            for name, values in rollout.prompts.columns.items()
            if name in self._names or (self._takes_all and name not in self._texts)
        }
        texts = [[texts[row] for row in rows] for texts in (rollout.prompts.prompts, rollout.responses)]
        named = {name: [values[row] for row in rows] for name, values in columns.items()}
        if timeout is None:
            returned = call_here(self.function, texts, named)
        else:
            returned = self._process.call(texts, named, timeout)
        try:
            return as_scores(returned, len(rows), rollout.tokens.device)
        except ValueError as error:
            raise CallFailed(f"returned something else than scores: {error}") from error

    def _one_by_one(self, rollout: Rollout) -> Tensor:
        """The scores of one call for each response, NaN where a call failed: ``[B]``."""
        scores = torch.full((len(rollout),), torch.nan, device=rollout.tokens.device)
        for row in range(len(rollout)):
            with contextlib.suppress(CallFailed):
                scores[row] = self._scores(rollout, [row], self.timeout)[0]
        return scores

    def _blame(self, rollout: Rollout, what: str) -> str:
        """The message about a failed call. It names the first response that also fails on its own, if there is one."""
        failure = f"reward {self.source}: the function {what}"
        remedy = "; correct it, or set on_error: skip to leave such responses out"
        limit = math.inf if self.timeout is None else time.monotonic() + self.timeout
        for row in range(len(rollout)):
            try:
                self._scores(rollout, [row], self.timeout)
            except CallFailed:
                return f"{failure}; it fails so for {quoted(rollout, row)}{remedy}"
            if time.monotonic() > limit:
                break
        return (
            f"{failure}; it fails for no single response, the first of {len(rollout)} is {quoted(rollout, 0)}{remedy}"
        )
