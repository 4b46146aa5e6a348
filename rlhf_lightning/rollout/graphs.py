"""Records steps of the decode loop as CUDA graphs, one for each number of rows and cache entries, and replays them.

A step of a small model has some hundred kernels, and launching each takes longer than running it. A graph launches all
of them at once.
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

_ENTRIES = 64  # graphs read a multiple of so many cache entries


def can_capture(policy: Policy) -> bool:
    """Whether the policy is on a GPU and not sharded. Sharded weights change their addresses between rollouts."""
    return next(policy.parameters()).device.type == "cuda" and not is_sharded(policy)


class StepGraphs:
    """A `Decoding` and the graphs of its steps, for one rollout after another with the same policy.

    The first step of a kind runs without a graph, which also initialises the libraries that it calls. The second step
    is recorded. If that fails, there is a warning, and all later steps run without new graphs.

    Args:
        policy, sampling: as for `Decoding`.
        rows: most rows of a rollout.
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
        self._pool: Any = None  # memory that the graphs share, since no two run at once
        self._capturing = True

    def fits(self, policy: Policy, rows: int, longest: int, sampling: Sampling) -> bool:
        """Whether another rollout can be made with these graphs."""
        if torch.is_autocast_enabled(self.decoding.row.device.type):
            return False
        recorded = replace(self.decoding.sampling, seed=sampling.seed, iteration=sampling.iteration)
        sizes = rows <= self.decoding.cache.slots and longest <= self._longest
        return sizes and recorded == sampling and self._weights == _addresses(policy)

    def advance(self, decode: Decode, rows: int, read: int) -> None:
        """Runs `Decoding.advance`, with its numbers rounded up to the next kind of step that has a graph."""
        key = self.kind(rows, read)
        if key in self._graphs:
            self._graphs[key]()
            return
        if self._capturing and key in self._seen:
            try:
                self._graphs[key] = self.capture(decode, *key)
            # The model may do anything that can't be recorded, and CUDA's errors have no common base class.
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
        """The smallest numbers of rows and entries that graphs are made for and that are large enough."""
        size = self.decoding.cache.slots
        while (size + 1) // 2 >= rows and size > 1:
            size = (size + 1) // 2
        return size, min(-(-read // _ENTRIES) * _ENTRIES, self.decoding.cache.capacity)

    def capture(self, decode: Decode, rows: int, read: int) -> Callable[[], None]:
        """Records a step without running it, and returns the function that runs it."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # The outer context restores the current stream, which torch does not do if a recording fails.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                # Other threads may use the GPU meanwhile, for example to load data.
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                self.decoding.advance(decode, rows, read)
        except Exception:
            self._end_recording(graph)
            raise
        return graph.replay

    def _end_recording(self, graph: torch.cuda.CUDAGraph) -> None:
        """Tells torch's allocator and random generator that a recording is over, which a failed one may not have done.

        Versions of torch differ in how much of it they do themselves, and raise an error if it is done again.
        """
        with suppress(RuntimeError):
            graph.pool()
            return  # the recording itself has succeeded
        device = self.decoding.row.device.index
        for over in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):
                over(device, self._pool)
        # A recording that succeeds resets the state of the random generator.
        again = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
        with suppress(RuntimeError), again:
            self.decoding.place.add(0)


def _addresses(policy: Policy) -> list[int]:
    return [tensor.data_ptr() for tensor in (*policy.parameters(), *policy.buffers())]
