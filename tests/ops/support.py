"""What the operators' tests share: the cases, and running the native and the reference path alike."""

from __future__ import annotations

import shutil

import pytest
import torch

from rlhf_lightning.ops import extension

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 7, 129, 1000]

needs_native = pytest.mark.skipif(not extension.LOADED, reason=f"no native operators: {extension._REASON}")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="torch.compile needs a C++ compiler"
)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def randint(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def with_threads(count: int, function):
    """``function()`` computed with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)
