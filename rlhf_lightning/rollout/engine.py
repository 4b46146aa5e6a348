"""The interface of rollout engines, which sample responses, and the `Rollout` that is made of their result.

Shapes: ``B`` rows, ``P`` prompt tokens, ``S`` prompt + response, ``T`` response tokens. docs/rollout.md shows how to
write your own engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout, length_mask
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.models.compilation import uncompiled
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.template import decoded
from rlhf_lightning.randomness import SAMPLING, uniform

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int  # a response that reaches it without EOS is truncated
    eos_ids: Sequence[int]  # token ids that end a response; the sampled one stays as its last token
    seed: int = 0  # seed and iteration choose the draws; equal numbers give equal responses
    iteration: int = 0
    temperature: float = 1.0  # logits are divided by it; 0 takes the most probable token (greedy)
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of most probable tokens whose probability reaches it; 1 keeps all

    def draws(self, rows: Tensor) -> Tensor:
        """The uniform numbers for sampling: row numbers ``[B]`` -> ``[B, max_new_tokens]`` float64 in (0, 1).

        A draw depends only on (seed, iteration, the row's number, the token's position). So the sampled tokens do not
        depend on the number of processes or on batching, and a resumed run samples the same.
        """
        positions = torch.arange(self.max_new_tokens, device=rows.device)
        return uniform(self.seed, SAMPLING, self.iteration, rows[:, None], positions)


class Responses(NamedTuple):
    """An engine's result: one row for every prompt, in the prompts' order. Values after a row's end are ignored."""

    tokens: Tensor  # [B, T] int64, with the EOS token if one was sampled
    log_probs: Tensor  # [B, T] float32 or float64, of each token under the distribution it was drawn from
    lengths: Tensor  # [B] int64, number of response tokens, EOS included; 0 if the engine gave none
    truncated: Tensor  # [B] bool: no EOS was sampled
    entropy: Tensor | None = None  # [B, T] nats, of the same distributions; None if the engine does not know it


class RolloutEngine(ABC):
    """Answers prompts with a policy. Subclasses write ``generate``, and ``receive`` if they keep their own weights."""

    # Whether its log-probs equal the policy's up to rounding, if top-k and top-p are off. Then methods that need the
    # policy's log-probs only for metrics use these, and save a forward pass.
    exact: bool = False

    def receive(self, policy: Policy) -> None:  # noqa: B027  most engines need none
        """Copies the policy's weights. It is called before the first ``generate`` after the weights have changed.

        Every process calls it. Engines whose ``generate`` computes with the policy itself need not define it.
        """

    @abstractmethod
    def generate(
        self, policy: Policy, prompts: PromptBatch, sampling: Sampling, progress: Progress | None = None
    ) -> Responses:
        """One response to every prompt.

        Args:
            policy: the model that answers, on this process's device; its parameters may be sharded.
            prompts: B prompts; ``prompts.rows`` gives the row numbers for the draws.
            sampling: how responses are sampled.
            progress: called with (tokens decoded so far in the longest response, ``sampling.max_new_tokens``). It
                raises if the run is to stop, also on a single process: make no collective after the first call.
        """

    @torch.no_grad()
    def rollout(
        self,
        policy: Policy,
        prompts: PromptBatch,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> Rollout:
        """Calls ``generate``, checks its result, and makes a `Rollout` of it.

        Raises:
            TrainingDiverged: a token's log-prob is NaN or infinite; names iteration and row.
            InputError: a token's id is not in the policy's vocabulary.
            ValueError: the engine returned a tensor of a wrong shape, or impossible lengths.
        """
        rows, device = len(prompts), prompts.tokens.device
        tokens, log_probs, lengths, truncated, entropy = self.generate(policy, prompts, sampling, progress)
        _check_shapes(type(self).__name__, rows, sampling, tokens, log_probs, lengths, truncated, entropy)
        longest = int(lengths.max()) if rows else 0
        inside = length_mask(lengths, longest)
        _check_ids(type(self).__name__, policy, tokens[:, :longest].to(device), inside, prompts.rows)
        # masked_fill, not a product, because values after a row's end may be NaN.
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        log_probs = log_probs[:, :longest].to(device, dtype).masked_fill(~inside, 0.0)
        _check_finite(log_probs, prompts.rows, sampling.iteration)
        if entropy is not None:
            entropy = entropy[:, :longest].to(device, dtype).masked_fill(~inside, 0.0)
        return Rollout(
            prompts=prompts,
            tokens=_joined(prompts, tokens, lengths),
            lengths=prompts.lengths + lengths,
            prompt_lengths=prompts.lengths,
            log_probs=log_probs,
            truncated=truncated,
            responses=decoded(
                tokenizer,
                [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)],
                sampling.eos_ids,
            ),
            entropy=entropy,
        )


@contextmanager
def ready_to_decode(policy: Policy) -> Iterator[None]:
    """Sets evaluation mode and uncompiled layers; under autocast, each weight is cast once for the whole rollout."""
    training = policy.training
    policy.eval()  # gradient checkpointing would drop the cache in train mode; dropout is off in both modes
    try:
        with uncompiled(policy), _cast_once(policy):
            yield
    finally:
        policy.train(training)


@contextmanager
def _cast_once(policy: Policy) -> Iterator[None]:
    # Lightning's autocast does not cache casts, so every token would cast the whole model anew. With few rows that
    # costs about as much as the step itself.
    device = next(policy.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    # Autocast caches only casts of weights that need gradients, and most weights of a LoRA policy are frozen.
    frozen = [p for p in policy.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()  # the next update changes the weights
        for parameter in frozen:
            parameter.requires_grad_(False)


def _check_shapes(
    engine: str,
    rows: int,
    sampling: Sampling,
    tokens: Tensor,
    log_probs: Tensor,
    lengths: Tensor,
    truncated: Tensor,
    entropy: Tensor | None,
) -> None:
    wide = {"tokens": tokens, "log_probs": log_probs} | ({} if entropy is None else {"entropy": entropy})
    for name, tensor in wide.items():
        if tensor.dim() != 2 or tensor.shape != tokens.shape or len(tensor) != rows:
            raise ValueError(f"{engine}.generate: {name} must be [{rows}, T], got {list(tensor.shape)}")
    for name, tensor in {"lengths": lengths, "truncated": truncated}.items():
        if tensor.shape != (rows,):
            raise ValueError(f"{engine}.generate: {name} must be [{rows}], got {list(tensor.shape)}")
    most = min(tokens.shape[1], sampling.max_new_tokens)
    if bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"{engine}.generate: lengths must lie between 0 and {most}, got {lengths.tolist()}")


def _check_ids(engine: str, policy: Policy, tokens: Tensor, inside: Tensor, numbers: Tensor) -> None:
    strange = policy.vocabulary.strangers(tokens) & inside
    if not bool(strange.any()):
        return
    row, step = strange.nonzero()[0].tolist()
    raise InputError(
        f"{engine}.generate: id {int(tokens[row, step])} was sampled for prompt row {int(numbers[row])}, and the "
        "tokenizer has no token for it: the engine must leave out the ids that policy.vocabulary.strangers() marks"
    )


def _check_finite(log_probs: Tensor, numbers: Tensor, iteration: int) -> None:
    bad = ~torch.isfinite(log_probs)
    if not bool(bad.any()):
        return
    step = int(bad.any(dim=0).nonzero()[0])
    row = int(numbers[bad[:, step]][0])
    raise TrainingDiverged(
        f"the policy's logits were NaN or infinite while sampling token {step} of prompt row {row} "
        f"in iteration {iteration}"
    )


def _joined(prompts: PromptBatch, response: Tensor, lengths: Tensor) -> Tensor:
    """Joins prompts and responses without a gap: ``[B, P]``, ``[B, T]`` -> ``[B, S]``, zeros after the end."""
    total = prompts.lengths + lengths
    tokens = prompts.tokens.new_zeros(len(prompts), int(total.max()) if len(prompts) else 0)
    in_prompt = length_mask(prompts.lengths, tokens.shape[1])
    tokens[in_prompt] = prompts.tokens[length_mask(prompts.lengths, prompts.tokens.shape[1])]
    in_response = length_mask(total, tokens.shape[1]) & ~in_prompt
    tokens[in_response] = response[length_mask(lengths, response.shape[1])]
    return tokens
