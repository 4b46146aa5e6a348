"""One seed for a run: passes ``seed_everything`` on to the data, the sampling and the fresh heads."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_lightning.cli.arguments import Option
from rlhf_lightning.cli.config_layers import Layers
from rlhf_lightning.errors import InputError

_LARGEST = 2**32 - 1  # the largest seed of numpy's generators
_SEEDED = ("data", "model")  # sections with a seed of their own: order and split; sampling, minibatches, fresh heads


def follow_seed_everything(layers: Layers, has_seed: Callable[[str], bool]) -> None:
    """Adds ``data.seed`` and ``model.seed`` to the options if ``seed_everything`` is given and they are not.

    If a config has them with the same value as its ``seed_everything``, as a run's config does, they are treated as not
    given: they followed ``seed_everything`` there. Without ``seed_everything`` nothing is added.

    Args:
        layers: the configs and options; gets the new options and notes.
        has_seed: tells whether the class of a section has the option ``seed``.
    """
    everywhere = layers.given(("seed_everything",))
    if not everywhere or type(seed := everywhere[-1][1]) is not int:
        return  # true and false: see `TrainingCLI._set_seed`
    if not 0 <= seed <= _LARGEST:
        raise InputError(f"seed_everything: expected a whole number from 0 to {_LARGEST}, got {seed}")
    followed = []
    for section in _SEEDED:
        seeds = layers.given((section, "seed"))
        if seeds:
            layer, value = seeds[-1]
            if value == seed or value != next((v for at, v in everywhere if at is layer), None):
                if value != seed and layer.path is not None:
                    followed.append(f"{section}.seed stays {value}, as {layer.name} says")
                continue
            followed.append(f"{section}.seed is {seed}, no longer {layer.name}'s {value}")
        if has_seed(section):
            layers.options.append(Option(f"{section}.seed", str(seed), (f"--{section}.seed={seed}",)))
    if followed:
        layers.notes.append(f"seed_everything {seed}: {'; '.join(followed)}")
