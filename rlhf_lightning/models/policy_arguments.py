"""The arguments of commands that let policies answer prompts: which policies, which prompts, and how they answer.

Nothing here imports torch before the arguments are read, so that ``--help`` and wrong options answer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_lightning.errors import InputError


def add_answer_arguments(add: Callable[..., object]) -> None:
    """Adds the arguments by a parser's ``add_argument``."""
    add("--policies", nargs="+", required=True, metavar="NAME=DIR", help="model folders; the name may be left out")
    add("--prompts", nargs="+", required=True, metavar="FILE", help="rows with prompts")
    add(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="our name of a key, and the name that your rows have for it: prompt=question",
    )
    add("--max_new_tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (default: %(default)s)")
    add("--max_prompts", type=int, help="ask only this many, evenly spread over the file")
    add("--batch_size", type=int, default=32, help="prompts at a time; changes no result (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampled answers (default: %(default)s)")
    add("--chat", action="store_true", help="put plain prompts through the chat template too")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the weights")


def check_numbers(options: argparse.Namespace) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        InputError: names the option.
    """
    for name in ("max_new_tokens", "batch_size", "max_prompts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected a number of at least 1")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise InputError(f"--temperature {options.temperature}: expected a number of at least 0")


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that float32 logits cannot be divided by. It imports torch, so `check_numbers` comes first.

    Raises:
        InputError: names the option.
    """
    from rlhf_lightning.ops.checks import LEAST_TEMPERATURE, MOST_TEMPERATURE

    if temperature and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        limits = f"{LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
        raise InputError(f"--temperature {temperature:g}: expected 0 or a number from {limits}")


def chosen_device(given: str | None) -> str:
    """The device's name: the given one, or by default a GPU if there is one.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    import torch

    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {device}: no CUDA device here, or torch was built without CUDA: leave the option out"
        )
    return device


def named(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    """``NAME=WHAT`` or ``WHAT`` as (name, what). A model folder without a name is named by its run.

    Raises:
        InputError: one is malformed, or two have one name.
    """
    pairs: list[tuple[str, str]] = []
    for item in given:
        name, separator, what = item.partition("=")
        if not separator:
            name, what = own_name(item), item
        if not name or not what:
            raise InputError(f"{option} {item}: expected NAME=DIR")
        if any(name == other for other, _ in pairs):
            raise InputError(f"{option}: two are named {name!r}: give each its own, as in NAME=DIR")
        pairs.append((name, what))
    return pairs


def own_name(what: str) -> str:
    """``runs/ppo/model`` is ppo, ``my_rewards.py:brevity`` is brevity."""
    if is_function(what):
        return what.rpartition(":")[2]
    path = Path(what)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def is_function(what: str) -> bool:
    """Whether it names a function, as in ``my_rewards.py:brevity``."""
    return ":" in what and not Path(what).exists()
