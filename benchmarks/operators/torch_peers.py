"""What people write in torch alone, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from operators.cases import FILTERS
from operators.inputs import CLIP, GAMMA, LAM, Inputs

Forward = Callable[[], dict[str, Tensor]]


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """Compiled for the very sizes at hand, as a training step with fixed sizes has it."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def cross_entropy(inputs: Inputs) -> Forward:
    """The mean loss, of float32 logits, as model code has it."""
    return lambda: {"loss": functional.cross_entropy(inputs["logits"].float(), inputs["tokens"])}


def compiled_cross_entropy(inputs: Inputs) -> Forward:
    function = compiled(lambda logits, tokens: functional.cross_entropy(logits.float(), tokens))
    return lambda: {"loss": function(inputs["logits"], inputs["tokens"])}


def direct_cross_entropy(inputs: Inputs) -> Forward:
    """The mean loss of the logits as they are: the loss and what the backward reads are rounded to their dtype."""
    return lambda: {"loss": functional.cross_entropy(inputs["logits"], inputs["tokens"])}


def compiled_direct_cross_entropy(inputs: Inputs) -> Forward:
    function = compiled(functional.cross_entropy)
    return lambda: {"loss": function(inputs["logits"], inputs["tokens"])}


def gather(inputs: Inputs) -> Forward:
    """The token's log-probability out of the whole table of them."""
    tokens = inputs["tokens"][:, None]
    return lambda: {"log_probs": inputs["logits"].float().log_softmax(-1).gather(-1, tokens)[:, 0]}


def unfused(inputs: Inputs) -> Forward:
    """The head's product, then the loss of its float32 logits."""
    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {"loss": functional.cross_entropy((hidden @ weight.T).float(), tokens)}


def _walk_back(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The operations of the loop in TRL's PPO trainer (1.12), which has it inline: no mask, one list of columns."""
    length, carried, columns = rewards.shape[1], 0, []
    for t in range(length - 1, -1, -1):
        after = values[:, t + 1] if t + 1 < length else 0.0
        error = rewards[:, t] + GAMMA * after - values[:, t]
        carried = error + GAMMA * LAM * carried
        columns.append(carried)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def trl_loop(inputs: Inputs) -> Forward:
    return lambda: dict(zip(("advantages", "returns"), _walk_back(inputs["rewards"], inputs["values"]), strict=True))


def compiled_loop(inputs: Inputs) -> Forward:
    function = compiled(_walk_back)
    return lambda: dict(zip(("advantages", "returns"), function(inputs["rewards"], inputs["values"]), strict=True))


def log_step_scan(inputs: Inputs) -> Forward:
    """GAE by doubling: after k steps an advantage holds the errors of the next ``2**k`` steps; rows end in zeros."""

    def forward() -> dict[str, Tensor]:
        rewards, values = inputs["rewards"], inputs["values"]
        advantages = rewards + GAMMA * functional.pad(values[:, 1:], (0, 1)) - values
        step, factor = 1, GAMMA * LAM
        while step < rewards.shape[1] and factor > 0:
            advantages = torch.add(advantages, functional.pad(advantages[:, step:], (0, step)), alpha=factor)
            step, factor = 2 * step, factor * factor
        return {"advantages": advantages, "returns": advantages + values}

    return forward


def multinomial(inputs: Inputs) -> Forward:
    """The filters, the softmax and the draw; neither log-probability nor entropy."""
    top_k, top_p = (inputs.case.shape.get(name) for name in FILTERS)

    def forward() -> dict[str, Tensor]:
        logits = inputs["logits"].float()
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        if top_p:
            ordered, order = logits.sort(descending=True)
            mass = ordered.softmax(-1)
            out = mass.cumsum(-1) - mass >= top_p
            logits = logits.masked_fill(out.scatter(-1, order, out), -torch.inf)
        probabilities = logits.softmax(-1)
        return {"tokens": torch.multinomial(probabilities, 1)[:, 0], "probabilities": probabilities}

    return forward


def _policy_loss(now: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    ratio = (now - old).exp()
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.max(free, held), held > free


def _value_loss(now: Tensor, old: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    free = (now - returns) ** 2
    held = (old + (now - old).clamp(-CLIP, CLIP) - returns) ** 2
    return 0.5 * torch.max(free, held), held > free


def _loss(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Forward:
    arguments = [inputs[name] for name in ("now", "old", "target")]
    return lambda: dict(zip(("loss", "clipped"), function(*arguments), strict=True))


def eager_policy_loss(inputs: Inputs) -> Forward:
    return _loss(_policy_loss, inputs)


def eager_value_loss(inputs: Inputs) -> Forward:
    return _loss(_value_loss, inputs)


def compiled_policy_loss(inputs: Inputs) -> Forward:
    return _loss(compiled(_policy_loss), inputs)


def compiled_value_loss(inputs: Inputs) -> Forward:
    return _loss(compiled(_value_loss), inputs)
