"""PPO as a careful PyTorch programmer writes it, with no operator of ours: for scale.

The same algorithm: the log-probs of the rollout, k1 penalty in the reward, GAE, whitened advantages, both losses
clipped. Careful: the LM head sees response positions alone, rows are right-padded so that attention needs no mask, the
optimizer is the fused AdamW, and nothing that is only logged is computed with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.clock import Meter
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from training.sizes import PRECISIONS, Size, work

GAMMA, LAM, CLIP, KL_COEF, VALUE_COEF = 1.0, 0.95, 0.2, 0.05, 0.1


def run(task: str, size: Size, folder: Path, device: str, precision: str, meter: Meter, seed: int) -> dict[str, Any]:
    """Trains ``meter.total`` iterations."""
    torch.manual_seed(seed)
    dtype = getattr(torch, PRECISIONS[precision])

    def causal() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype).to(device)

    def scalar() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=dtype)
        return model.to(device)

    policy, critic = causal(), scalar()
    reference, reward = causal().requires_grad_(False), scalar().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *critic.parameters()], lr=size.learning_rate["ppo"], weight_decay=0.0, fused=True
    )
    rows = work(folder)["prompts"]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    prompts = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    # Passes are under it, one at a time: autocast's copies of weights must not outlive an optimizer's step.
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16-mixed")
    meter.begin()
    for _ in range(meter.total):
        _iteration(policy, critic, reference, reward, optimizer, prompts, lengths, size, meter, autocast)
        meter.step_ended()
    return meter.result((policy, critic, reference, reward), optimizer)


def _iteration(
    policy: Any,
    critic: Any,
    reference: Any,
    reward: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Tensor,
    lengths: Tensor,
    size: Size,
    meter: Meter,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    with torch.no_grad(), autocast():
        with meter.phase("rollout"):
            tokens, old = rollout(policy, prompts, lengths, size.new_tokens)
        steps = torch.arange(size.new_tokens, device=tokens.device)
        with meter.phase("reference"):
            reference_log_probs = response_log_probs(reference, tokens, lengths, steps)
        with meter.phase("reward"):
            scores = scalars(reward, tokens).gather(1, lengths[:, None] + size.new_tokens - 1)[:, 0]
        with meter.phase("critic"):
            values = scalars(critic, tokens).gather(1, lengths[:, None] - 1 + steps)
        rewards = -KL_COEF * (old - reference_log_probs)
        rewards[:, -1] += scores
        advantages, last = torch.empty_like(rewards), torch.zeros_like(scores)
        for step in reversed(range(size.new_tokens)):
            following = values[:, step + 1] if step + 1 < size.new_tokens else 0.0
            last = rewards[:, step] + GAMMA * following - values[:, step] + GAMMA * LAM * last
            advantages[:, step] = last
        returns = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    with meter.phase("update"):
        for part in torch.randperm(len(tokens), device=tokens.device).tensor_split(size.minibatches):
            for rows in part.split(size.micro_rows or len(part)):
                width = int(lengths[rows].max()) + size.new_tokens
                inputs = tokens[rows, :width]
                with autocast():
                    log_probs = response_log_probs(policy, inputs, lengths[rows], steps)
                    predicted = scalars(critic, inputs).gather(1, lengths[rows][:, None] - 1 + steps)
                ratio = (log_probs - old[rows]).exp()
                gain = torch.minimum(advantages[rows] * ratio, advantages[rows] * ratio.clamp(1 - CLIP, 1 + CLIP))
                clipped = values[rows] + (predicted - values[rows]).clamp(-CLIP, CLIP)
                errors = torch.maximum((predicted - returns[rows]).square(), (clipped - returns[rows]).square())
                loss = -gain.mean() + VALUE_COEF * 0.5 * errors.mean()
                (loss * len(rows) / len(part)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.add(optimizer_steps=1)
    kl = (old - reference_log_probs).sum(1).mean()
    meter.add(new_tokens=old.numel(), score=float(scores.mean()), kl=float(kl))


def rollout(policy: Any, prompts: Tensor, lengths: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Right-padded prompts and responses ``[B, P + T]``, and the log-probs of the responses ``[B, T]``."""
    rows, width = prompts.shape
    seen = torch.arange(width, device=prompts.device) < lengths[:, None]
    cache = DynamicCache()
    inputs, positions, last = prompts, torch.arange(width, device=prompts.device).expand(rows, width), lengths - 1
    tokens, log_probs = [], []
    for step in range(new_tokens):
        states = policy.model(
            input_ids=inputs, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = policy.lm_head(states[torch.arange(rows, device=states.device), last]).float()
        distribution = logits.log_softmax(-1)
        chosen = torch.multinomial(distribution.exp(), 1)
        tokens.append(chosen)
        log_probs.append(distribution.gather(1, chosen))
        seen = functional.pad(seen, (0, 1), value=True)
        inputs, positions, last = chosen, (lengths + step)[:, None], torch.zeros_like(lengths)
    whole = functional.pad(prompts, (0, new_tokens))
    steps = torch.arange(new_tokens, device=prompts.device)
    whole.scatter_(1, lengths[:, None] + steps, torch.cat(tokens, 1))
    return whole, torch.cat(log_probs, 1)


def response_log_probs(model: Any, tokens: Tensor, lengths: Tensor, steps: Tensor) -> Tensor:
    """``[B, T]``; the head sees the positions before response tokens and no others."""
    states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    places = lengths[:, None] - 1 + steps
    states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
    logits = model.lm_head(states).float()
    targets = tokens.gather(1, places + 1)
    return -functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def scalars(model: nn.Module, tokens: Tensor) -> Tensor:
    """``[B, S]``: the number at every position."""
    states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    result: Tensor = model.score(states)[..., 0].float()
    return result
