"""Steps of the decode loop as CUDA graphs: recorded once for a number of rows and of cache entries, then replayed.

A step of a small model is some hundred kernels that take less time than their launches; a graph launches them at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.rollout.decoding import Decode, Decoding
from rlhf_lightning.rollout.engine import Sampling

_ENTRIES = 64  # a graph for every so many cache entries


def can_capture(policy: Policy) -> bool:
    """Whether the policy is on a GPU, and whole: sharded weights move between rollouts."""
    return next(policy.parameters()).device.type == "cuda" and not is_sharded(policy)


class StepGraphs:
    """A `Decoding` and the graphs of its steps, for one rollout after another with the same policy.

    The first step of a kind runs as it is, which also readies the libraries that it calls; the second is recorded.
    A step that can't be recorded warns, and then all run as they are.

    Args:
        policy, sampling: as for `Decoding`.
        rows: of the rollouts, at most.
        longest: tokens of the longest prompt.
    """

    def __init__(self, policy: Policy, rows: int, longest: int, sampling: Sampling) -> None:
        like = next(policy.parameters())
        entries = -(-(longest + sampling.max_new_tokens) // _ENTRIES) * _ENTRIES
        self.decoding = Decoding(rows, entries, sampling, like)
        self._longest = entries - sampling.max_new_tokens
        self._weights = _addresses(policy)
        self._seen: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self._pool: Any = None  # memory that the graphs share: no two run at once
        self._capturing = True

    def fits(self, policy: Policy, rows: int, longest: int, sampling: Sampling) -> bool:
        """Whether another rollout can be made with these graphs."""
        if torch.is_autocast_enabled(self.decoding.row.device.type):
            return False
        own = replace(self.decoding.sampling, seed=sampling.seed, iteration=sampling.iteration)
        sizes = rows <= self.decoding.cache.slots and longest <= self._longest
        return sizes and own == sampling and self._weights == _addresses(policy)

    def advance(self, decode: Decode, rows: int, read: int) -> None:
        """`Decoding.advance` of the next larger kind of step."""
        key = self.kind(rows, read)
        if key in self._graphs:
            self._graphs[key]()
            return
        if self._capturing and key in self._seen:
            try:
                self._graphs[key] = self.capture(decode, *key)
            # Whatever the model does that can't be recorded: CUDA's errors have no common base.
            except Exception as error:
                self._capturing = False
                reason = " ".join(str(error).split())[:300]
                warnings.warn(
                    f"this model's decode step can't be recorded as a CUDA graph ({reason}); decoding goes on without, "
                    "more slowly",
                    stacklevel=2,
                )
            else:
                self._graphs[key]()
                return
        self._seen.add(key)
        self.decoding.advance(decode, *key)

    def kind(self, rows: int, read: int) -> tuple[int, int]:
        """The numbers of rows and entries, of those that graphs are made for, that are enough."""
        size = self.decoding.cache.slots
        while (size + 1) // 2 >= rows and size > 1:
            size = (size + 1) // 2
        return size, min(-(-read // _ENTRIES) * _ENTRIES, self.decoding.cache.capacity)

    def capture(self, decode: Decode, rows: int, read: int) -> Callable[[], None]:
        """Record a step without running it; what runs it."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # Outside, the current stream, which torch does not go back to from a recording that fails.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                # Other threads may use the GPU meanwhile, as those that load data do.
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                self.decoding.advance(decode, rows, read)
        except Exception:
            self._end_recording(graph)
            raise
        return graph.replay

    def _end_recording(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tell torch's allocator and random numbers that a recording is over, which a failed one may leave undone.

        Versions of torch differ in how much of it they do themselves, and refuse to do that again.
        """
        with suppress(RuntimeError):
            graph.pool()
            return  # the recording has ended well: what failed was something else
        device = self.decoding.row.device.index
        for over in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):
                over(device, self._pool)
        # The end of a recording that succeeds resets the state of the random numbers.
        again = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
        with suppress(RuntimeError), again:
            self.decoding.place.add(0)


def _addresses(policy: Policy) -> list[int]:
    return [tensor.data_ptr() for tensor in (*policy.parameters(), *policy.buffers())]
