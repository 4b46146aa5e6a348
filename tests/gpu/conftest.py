"""The device that a test runs on. Where there is no GPU the tests run on the CPU, so that they are known to work."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

NO_GPU = "no GPU"
GPU = torch.cuda.is_available()


@pytest.fixture(params=["cuda"] if GPU else ["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU; without one the CPU, and once more, skipped, for the GPU."""
    if request.param == "cuda" and not GPU:
        pytest.skip(NO_GPU)
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for what a CPU cannot tell."""
    if not GPU:
        pytest.skip(NO_GPU)
    return torch.device("cuda")


# The modules take the types of their options from jsonargparse, which only the command line needs. A GPU machine may
# lack it: plain numbers stand in for them there, unchecked.
if importlib.util.find_spec("jsonargparse") is None:
    package, typing = types.ModuleType("jsonargparse"), types.ModuleType("jsonargparse.typing")
    floats = ["ClosedUnitInterval", "NonNegativeFloat", "OpenUnitInterval", "PositiveFloat"]
    typing.__dict__.update(dict.fromkeys(floats, float) | dict.fromkeys(("NonNegativeInt", "PositiveInt"), int))
    typing.__dict__["restricted_number_type"] = lambda name, base, rules, **words: base
    package.__dict__["typing"] = typing
    sys.modules |= {"jsonargparse": package, "jsonargparse.typing": typing}
