"""A reward that is a Python function of text."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards.base import Reward, check_scores


class FunctionReward(Reward):
    """Calls ``function(prompts, responses, **columns)``.

    Args:
        function: where the function is: ``path/to/file.py:name`` or ``package.module:name``. The file is imported,
            which runs it: name only code that you trust. It may import modules that lie beside it.

    The function gets two lists of B strings, the prompts as the user wrote them and the responses without special
    tokens, and the rows' other columns by name, each a list of B (a function that names only some of them gets only
    those). It returns B numbers: a list, an array or a tensor.

    Raises: InputError when the function cannot be found, raises, or returns something other than B finite numbers.
    """

    def __init__(self, function: str) -> None:
        super().__init__()
        self.source = function
        self.function = load_function(function)
        parameters = inspect.signature(self.function).parameters.values()
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}

    def forward(self, rollout: Rollout) -> Tensor:
        columns = rollout.prompts.columns
        if not self._takes_all:
            columns = {name: values for name, values in columns.items() if name in self._names}
        try:
            scores = self.function(list(rollout.prompts.prompts), list(rollout.responses), **columns)
        except Exception as error:
            raise InputError(
                f"reward {self.source}: the function raised {type(error).__name__}: {error} "
                f"(first prompt {rollout.prompts.prompts[0][:80]!r}, first response {rollout.responses[0][:80]!r})"
            ) from error
        return check_scores(scores, rollout, self.source)


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` or ``package.module:name`` names; InputError where there is none."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise InputError(f"reward function {name!r}: expected file.py:name or package.module:name")
    try:
        module = (
            _import_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"reward function {name!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(sorted(n for n, v in vars(module).items() if inspect.isfunction(v))) or "none"
        raise InputError(
            f"reward function {name!r}: {module_name} has no function {attribute!r}; its functions: {found}"
        )
    return function


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"reward function file {path} does not exist; the path is relative to {Path.cwd()}")
    path = path.resolve()
    # A name of its own: two files may have the same name, or that of a package.
    name = f"reward_{path.stem}_{hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look a class's module up there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that a helper cannot stand in for an installed package
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
