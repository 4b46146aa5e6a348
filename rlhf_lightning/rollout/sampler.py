"""Sampling responses: the decode loop, its cache, and one inverse-CDF draw a token.

Shapes: ``B`` rows, ``P`` prompt tokens, ``S`` prompt + response, ``T`` response tokens, ``V`` vocabulary.

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
    log_probs = torch.zeros(rows, max_new_tokens, dtype=torch.float32, device=device)
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
    with unsharded(policy), _evaluating(policy), _cast_once(device):
        for step in range(max_new_tokens):
            going = not bool(ended.all())
            if not (any_unfinished(going) if any_unfinished is not None else going):
                break
            logits = policy.decode(inputs, positions, seen, cache, last)
            tempered = filtered_logits(logits, temperature, top_k, top_p)
            draws = uniform(seed, SAMPLING, iteration, prompts.rows[active], step)
            chosen, chosen_log_probs = draw(tempered, draws, greedy=temperature == 0)
            if not bool(torch.isfinite(chosen_log_probs).all()):
                row = int(prompts.rows[active[~torch.isfinite(chosen_log_probs)][0]])
                raise TrainingDiverged(
                    f"the policy's logits were NaN or infinite while sampling token {step} of prompt row {row} "
                    f"in iteration {iteration}"
                )
            live = ~ended[active]
            tokens[active, step] = torch.where(live, chosen, 0)
            log_probs[active, step] = torch.where(live, chosen_log_probs.float(), 0.0)
            lengths[active] += live.to(lengths.dtype)
            ended[active] |= torch.isin(chosen, ends)
            if progress is not None:
                progress(step + 1, max_new_tokens)
            keep = _still_going(ended[active], at_least_one=any_unfinished is not None)
            if len(keep) < len(active):
                cache.batch_select_indices(keep)
            active, chosen = active[keep], chosen[keep]
            seen = torch.cat([seen[keep], torch.ones(len(keep), 1, dtype=torch.bool, device=device)], dim=1)
            inputs = chosen[:, None]
            positions = (prompts.lengths[active] + step)[:, None]
            last = torch.zeros_like(chosen)
    return _assemble(prompts, tokens, log_probs, lengths, truncated=~ended, tokenizer=tokenizer)


def filtered_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits ``[B, V]`` divided by the temperature, -inf at tokens that top-k or top-p leave out; float64.

    Top-k comes first, top-p is taken of what is left (Holtzman et al. 2020, arXiv 1904.09751). The most probable token
    always stays. Ties at the k-th place all stay.
    """
    # Every row is computed by itself and in float64: a row's draw must not depend on its neighbours in the batch.
    logits = logits.double() if temperature == 0 else logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(out, -torch.inf)
    return logits


def draw(logits: Tensor, draws: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draws: the first token whose cumulative probability exceeds the uniform draw.

    Args:
        logits: ``[B, V]`` float64.
        draws: ``[B]`` float64 in (0, 1).
        greedy: take the most probable token instead; its log-prob is then the one under ``softmax(logits)``.

    Returns: ``(tokens [B] int64, log_probs [B])``. NaN or +inf logits give a NaN log-prob.
    """
    log_probs = logits.log_softmax(dim=-1)
    if greedy:
        tokens = log_probs.argmax(dim=-1)
    else:
        cumulative = log_probs.exp().cumsum(dim=-1)
        # Scaled by the total, which rounding leaves a little off 1; right=True passes over tokens of probability 0.
        points = (draws * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


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


def _still_going(ended: Tensor, at_least_one: bool) -> Tensor:
    keep = (~ended).nonzero()[:, 0]
    # Dropping rows copies the whole cache, so it waits until an eighth of them have ended.
    if 0 < len(ended) - len(keep) < len(ended) / 8 and len(keep) > 0:
        return torch.arange(len(ended), device=ended.device)
    # A process that has finished keeps one row going, so that it can take part in the others' collectives.
    return keep if len(keep) or not at_least_one else keep.new_zeros(1)


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
