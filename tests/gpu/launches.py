"""What a GPU was given to do: the names of kernels, copies and fills, as torch.profiler sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

OURS = "rlhf_lightning"  # the namespace of every kernel of csrc/


def launched(function: Callable[[], Any]) -> list[str]:
    """The names of all that ran on the GPU on behalf of ``function()``; nothing else may be at work there."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
