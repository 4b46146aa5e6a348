"""Sampling responses: the decode loop, its cache, and one inverse-CDF draw a token (`ops.sample_tokens`).

Shapes: ``B`` rows, ``P`` prompt tokens, ``S`` prompt + response, ``T`` response tokens.

A draw depends on (seed, iteration, the row's global number, the token's position) alone, so neither the process count,
nor batching, nor a resumed run changes what is sampled. Rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout, length_mask
from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharding import unsharded
from rlhf_lightning.ops.sample_tokens import sample_tokens
from rlhf_lightning.randomness import SAMPLING, uniform


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: PromptBatch,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    eos_ids: list[int],
    seed: int,
    iteration: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    any_unfinished: Callable[[bool], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """One response to every prompt.

    Args:
        policy: the model that answers; its parameters are gathered once for the whole loop where they are sharded.
        prompts: B prompts; ``prompts.rows`` number the draws.
        tokenizer: decodes the responses to text.
        max_new_tokens: T at most. A response that reaches it without EOS is marked truncated; no EOS is added.
        eos_ids: token ids that end a response; the one sampled is kept as its last token.
        seed, iteration: which draws are used; equal numbers give equal responses.
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches it; 1 keeps all.
        any_unfinished: with several processes over sharded parameters, tells from this process's "still going" whether
            any process is: all must take part in every step.
        progress: called with (tokens decoded so far in the longest response, max_new_tokens).

    Raises: TrainingDiverged when the logits of a step are NaN or infinite, naming iteration and row.
    """
    device = prompts.tokens.device
    rows = prompts.tokens.shape[0]
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
    # float32 whatever the weights' precision, but float64 stays float64.
    precise = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    log_probs = torch.zeros(rows, max_new_tokens, dtype=precise, device=device)
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    ends = torch.tensor(eos_ids, dtype=torch.int64, device=device)
    active = torch.arange(rows, device=device)  # the rows still in the batch, by number
    cache = DynamicCache()
    width = prompts.tokens.shape[1]
    seen = length_mask(prompts.lengths, width)  # [B, kv] which cache entries are real
    inputs = prompts.tokens
    positions = torch.arange(width, device=device).expand(rows, width)
    last = prompts.lengths - 1
    # All at once: it takes some hundred small operations, which each step would pay anew.
    draws = uniform(seed, SAMPLING, iteration, prompts.rows[:, None], torch.arange(max_new_tokens, device=device))
    going = rows > 0
    with unsharded(policy), _evaluating(policy), _cast_once(device):
        for step in range(max_new_tokens):
            if not (any_unfinished(going) if any_unfinished is not None else going):
                break
            logits = policy.decode(inputs, positions, seen, cache, last)
            chosen, chosen_log_probs, _ = sample_tokens(logits, draws[active, step], temperature, top_k, top_p)
            live = ~ended[active]
            tokens[active, step] = torch.where(live, chosen, 0)
            log_probs[active, step] = torch.where(live, chosen_log_probs.to(precise), 0.0)
            lengths[active] += live.to(lengths.dtype)
            ended[active] |= torch.isin(chosen, ends) | ~torch.isfinite(chosen_log_probs)  # the latter is told below
            if progress is not None:
                progress(step + 1, max_new_tokens)
            unfinished = (~ended[active]).nonzero()[:, 0]  # the loop waits for the device here alone
            going = len(unfinished) > 0
            keep = _kept(unfinished, active, at_least_one=any_unfinished is not None)
            if len(keep) < len(active):
                cache.batch_select_indices(keep)
            active, chosen = active[keep], chosen[keep]
            seen = torch.cat([seen[keep], torch.ones(len(keep), 1, dtype=torch.bool, device=device)], dim=1)
            inputs = chosen[:, None]
            positions = (prompts.lengths[active] + step)[:, None]
            last = torch.zeros_like(chosen)
    _check_finite(log_probs, prompts.rows, iteration)
    return _assemble(prompts, tokens, log_probs, lengths, truncated=~ended, tokenizer=tokenizer)


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    # Gradient checkpointing drops the cache in train mode; dropout is off in either.
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)


@contextmanager
def _cast_once(device: torch.device) -> Iterator[None]:
    """Under autocast, cast each weight once for the whole loop.

    Lightning's autocast keeps no casts, so every token would cast the whole model anew, which costs about as much as
    the step itself where few rows are decoded.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    try:
        with torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()  # the next update changes the weights


def _kept(unfinished: Tensor, active: Tensor, at_least_one: bool) -> Tensor:
    # Dropping rows copies the whole cache, so it waits until an eighth of them have ended.
    if 0 < len(active) - len(unfinished) < len(active) / 8 and len(unfinished) > 0:
        return torch.arange(len(active), device=active.device)
    # A process that has finished keeps one row going, so that it can take part in the others' collectives.
    return unfinished if len(unfinished) or not at_least_one else unfinished.new_zeros(1)


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


def _assemble(
    prompts: PromptBatch,
    response: Tensor,
    log_probs: Tensor,
    lengths: Tensor,
    truncated: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    rows = len(prompts)
    longest = int(lengths.max()) if rows else 0
    total = prompts.lengths + lengths
    tokens = prompts.tokens.new_zeros(rows, int(total.max()) if rows else 0)
    tokens[length_mask(prompts.lengths, tokens.shape[1])] = prompts.tokens[
        length_mask(prompts.lengths, prompts.tokens.shape[1])
    ]
    in_response = length_mask(total, tokens.shape[1]) & ~length_mask(prompts.lengths, tokens.shape[1])
    tokens[in_response] = response[length_mask(lengths, response.shape[1])]
    texts = tokenizer.batch_decode(
        [response[row, : lengths[row]].tolist() for row in range(rows)], skip_special_tokens=True
    )
    return Rollout(
        prompts=prompts,
        tokens=tokens,
        lengths=total,
        prompt_lengths=prompts.lengths,
        log_probs=log_probs[:, :longest],
        truncated=truncated,
        responses=texts,
    )
