"""The state of a rollout, and its decode step, which works in place so that a CUDA graph can replay it.

Shapes: ``R`` slots, ``B`` of them with a row; ``T`` response tokens at most; ``n`` slots in the batch, ``kv`` cache
entries read of each. Every row has a slot, and the first ``n`` slots are the batch. When a row ends, the last row of
the batch takes its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.ops.sample_tokens import sample_tokens
from rlhf_lightning.rollout.cache import SlotCache
from rlhf_lightning.rollout.engine import Responses, Sampling

Decode = Callable[..., Tensor]  # `Policy.decode`, or the same compiled
_PADDING = 1.25  # a prefill has at most this many times as many padded tokens as real ones


class Decoding:
    """The state of one rollout after another. The tensors are made once, for the largest rollout.

    Args:
        slots: R.
        capacity: cache entries of a slot: the longest prompt plus T.
        sampling: how the first rollout samples; later ones may differ only in seed and iteration.
        like: a parameter of the policy. Log-probs are float32, or float64 if the parameter is.
    """

    def __init__(self, slots: int, capacity: int, sampling: Sampling, like: Tensor) -> None:
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        self.sampling = sampling
        self.cache = SlotCache(slots, capacity, device)
        width = sampling.max_new_tokens
        # By slot.
        self.row = torch.zeros(slots, dtype=torch.int64, device=device)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)  # the last sampled, not in the cache yet
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)
        # By row.
        self.draws = torch.zeros(slots, width, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(slots, width, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(slots, width, dtype=dtype, device=device)
        self.entropy = torch.zeros(slots, width, dtype=dtype, device=device)
        self.sampled = torch.zeros(slots, dtype=torch.int64, device=device)
        self.truncated = torch.zeros(slots, dtype=torch.bool, device=device)

        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # the position in the response that comes next
        self.ends = torch.tensor(list(sampling.eos_ids), dtype=torch.int64, device=device)
        self.lengths: list[int] = []  # the prompts' lengths, by slot
        self.rows = self.steps = 0  # n, and the number of tokens sampled so far for each row in the batch

    @property
    def longest(self) -> int:
        """kv: the cache entries of the longest row in the batch, including the entry that the next step adds."""
        return max(self.lengths[: self.rows]) + self.steps

    def prefill(self, policy: Policy, prompts: PromptBatch, sampling: Sampling, budget: int) -> None:
        """Reads the prompts in groups of similar length, and samples the first token of each response."""
        lengths, count = prompts.lengths.tolist(), len(prompts)
        order = sorted(range(count), key=lambda row: -lengths[row])
        self.lengths = [lengths[row] for row in order]
        self.rows, self.steps = count, 1
        # Slots without a row count as rows that have ended.
        self.row.copy_(torch.tensor([*order, *range(count, self.cache.slots)]))
        self.ended.copy_(torch.arange(self.cache.slots) >= count)
        self.draws[:count] = sampling.draws(prompts.rows)
        for zeroed in (self.cache.lengths, self.tokens, self.log_probs, self.entropy, self.sampled, self.place):
            zeroed.zero_()
        self.truncated.fill_(True)
        for first, last in prefill_groups(self.lengths, budget):
            rows, width = self.row[first:last], self.lengths[first]
            filled = prompts.lengths[rows]
            positions = torch.arange(width, device=rows.device).expand(last - first, width)
            logits = policy.decode(prompts.tokens[rows, :width], positions, self.cache.prefill(first), filled - 1)
            self.cache.lengths[first:last] = filled
            self._sample(logits, first, last)
        self.place += 1

    def advance(self, decode: Decode, rows: int, read: int) -> None:
        """Samples one more token for each of the first ``rows`` slots, and reads ``read`` cache entries of each.

        Both numbers may be larger than needed: tokens of rows that have ended are dropped, and the mask hides entries
        that no row may see. Nothing here waits for the device, and every tensor that outlives the call is written in
        place. So a CUDA graph of the call can be replayed.
        """
        lengths, tokens = self.cache.lengths[:rows, None], self.token[:rows, None]
        logits = decode(tokens, lengths, self.cache.step(rows, read), slots=self.cache)
        self._sample(logits, 0, rows)
        self.cache.lengths[:rows] += 1
        self.place += 1

    def _sample(self, logits: Tensor, first: int, last: int) -> None:
        rows, ended = self.row[first:last], self.ended[first:last]
        options = self.sampling
        tokens, log_probs, entropy = sample_tokens(
            logits, self.draws[rows, self.place], options.temperature, options.top_k, options.top_p
        )
        self.tokens[rows, self.place] = tokens.masked_fill(ended, 0)
        self.log_probs[rows, self.place] = log_probs.to(self.log_probs.dtype).masked_fill(ended, 0.0)
        self.entropy[rows, self.place] = entropy.to(self.entropy.dtype).masked_fill(ended, 0.0)
        self.sampled[rows] += ~ended
        at_end = (tokens[:, None] == self.ends).any(dim=1)
        self.truncated[rows] &= ended | ~at_end
        ended |= at_end | ~torch.isfinite(log_probs)  # `RolloutEngine.rollout` raises an error for such a log-prob
        self.token[first:last] = tokens

    def leave(self) -> bool:
        """Takes the rows that have ended out of the batch. Returns False if no row is left."""
        ended = self.ended[: self.rows].tolist()  # only here the loop waits for the device
        left = self.rows - sum(ended)
        holes = [slot for slot in range(left) if ended[slot]]
        last = [slot for slot in range(left, self.rows) if not ended[slot]]
        if holes:
            self._swap(holes, last)
        self.rows = left
        return left > 0

    def _swap(self, holes: list[int], last: list[int]) -> None:
        target = torch.tensor(holes, device=self.row.device)
        source = torch.tensor(last, device=self.row.device)
        self.cache.move(source, target, self.longest)
        for slots in (self.row, self.token, self.ended, self.cache.lengths):
            slots[target], slots[source] = slots[source], slots[target]
        for hole, slot in zip(holes, last, strict=True):
            self.lengths[hole], self.lengths[slot] = self.lengths[slot], self.lengths[hole]

    def responses(self, rows: int) -> Responses:
        """The sampled responses, in the prompts' order."""
        found = self.tokens, self.log_probs, self.sampled, self.truncated, self.entropy
        return Responses(*(tensor[:rows].clone() for tensor in found))


def prefill_groups(lengths: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows for one prefill each, within the budget and with little padding. ``lengths`` is falling."""
    first = real = 0
    for row, length in enumerate(lengths):
        padded = lengths[first] * (row + 1 - first)
        if row > first and (padded > budget or padded > _PADDING * (real + length)):
            yield first, row
            first, real = row, 0
        real += length
    if first < len(lengths):
        yield first, len(lengths)
