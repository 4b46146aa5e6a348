"""The state of a rollout, and a step of it that works in place on tensors that stay where they are.

Shapes: ``R`` slots, ``B`` of them with a row; ``T`` response tokens at most; ``n`` slots in the batch, ``kv`` cache
entries read of each. A row has a slot, and the first slots are the batch: a row that ends makes room for the last one.
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
_PADDING = 1.25  # padded tokens of a prefill, at most this many times its real ones


class Decoding:
    """One rollout after another, of at most so many rows and tokens each.

    Args:
        slots: R.
        capacity: cache entries of a slot: the longest prompt and T.
        sampling: of the first rollout; others may differ in seed and iteration alone.
        like: a parameter of the policy. Log-probs are float32 whatever its precision, but float64 for float64.
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

        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # which token of the responses comes next
        self.ends = torch.tensor(list(sampling.eos_ids), dtype=torch.int64, device=device)
        self.lengths: list[int] = []  # of the prompts, by slot
        self.rows = self.steps = 0  # n, and tokens sampled so far for each row in the batch

    @property
    def longest(self) -> int:
        """kv: the cache entries of the longest row in the batch, the one that the next step adds included."""
        return max(self.lengths[: self.rows]) + self.steps

    def prefill(self, policy: Policy, prompts: PromptBatch, sampling: Sampling, budget: int) -> None:
        """Read the prompts, in groups of similar length, and sample the first token of each response."""
        lengths, count = prompts.lengths.tolist(), len(prompts)
        order = sorted(range(count), key=lambda row: -lengths[row])
        self.lengths = [lengths[row] for row in order]
        self.rows, self.steps = count, 1
        # The slots without a row are rows that have ended.
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
        """One more token for each of the first ``rows`` slots, reading ``read`` cache entries of each.

        Both may be more than needed: what a row that has ended is given is dropped, and what no row sees is masked.
        Nothing here waits for the device, and every tensor that outlives the call is written in place: a CUDA graph of
        it can be replayed.
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
        ended |= at_end | ~torch.isfinite(log_probs)  # the latter is an error, which `RolloutEngine.rollout` raises
        self.token[first:last] = tokens

    def leave(self) -> bool:
        """Take the rows that have ended out of the batch; False if none is left."""
        ended = self.ended[: self.rows].tolist()  # the loop waits for the device here alone
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
        """What was sampled, in the prompts' order."""
        found = self.tokens, self.log_probs, self.sampled, self.truncated, self.entropy
        return Responses(*(tensor[:rows].clone() for tensor in found))


def prefill_groups(lengths: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, whose lengths fall, that one prefill takes: within the budget, and with little padding."""
    first = real = 0
    for row, length in enumerate(lengths):
        padded = lengths[first] * (row + 1 - first)
        if row > first and (padded > budget or padded > _PADDING * (real + length)):
            yield first, row
            first, real = row, 0
        real += length
    if first < len(lengths):
        yield first, len(lengths)
