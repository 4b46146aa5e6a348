"""Every side: this library's operators, what people write in torch alone, and what other libraries ship.

Each function takes inputs and gives the call that makes the outputs. A library is imported from its own folder, by the
one process that calls it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from operators.cases import FILTERS
from operators.inputs import CLIP, GAMMA, LAM, Inputs

Forward = Callable[[], dict[str, Tensor]]


# This library


def ours(inputs: Inputs) -> Forward:
    """The operator as the modules call it: its tensors in their order, then its numbers."""
    from rlhf_lightning import ops

    name, operator = inputs.case.operator, getattr(ops, inputs.case.operator)
    outputs: dict[str, tuple[str, ...]] = {
        "gae": ("advantages", "returns"),
        "clipped_policy_loss": ("loss", "clipped"),
        "clipped_value_loss": ("loss", "clipped"),
        "sample_tokens": ("tokens", "log_probs", "entropy"),
        "linear_cross_entropy": ("loss", "log_probs", "entropy"),
    }
    names = outputs.get(name, ("log_probs", "entropy"))
    arguments = list(inputs.tensors.values())
    arguments += {"gae": [GAMMA, LAM], "clipped_policy_loss": [CLIP, CLIP], "clipped_value_loss": [CLIP]}.get(name, [])
    if name == "linear_cross_entropy":
        tokens = inputs["tokens"]
        arguments.append(torch.full(tokens.shape, 1 / tokens.numel(), device=tokens.device))
    filters = {key: inputs.case.shape[key] for key in FILTERS if key in inputs.case.shape}
    return lambda: dict(zip(names, operator(*arguments, **filters), strict=True))


def release_kept_memory() -> None:
    """Gives the freed blocks that our operators keep for their next results back to the system."""
    from rlhf_lightning import _C

    _C.release_kept_memory()


# torch alone, eager and compiled


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


def eager_loss(inputs: Inputs) -> Forward:
    return _loss(inputs, lambda function: function)


def compiled_loss(inputs: Inputs) -> Forward:
    return _loss(inputs, compiled)


def _loss(inputs: Inputs, made: Callable[..., Callable[..., object]]) -> Forward:
    function = made({"clipped_policy_loss": _policy_loss, "clipped_value_loss": _value_loss}[inputs.case.operator])
    arguments = [inputs[name] for name in ("now", "old", "target")]
    return lambda: dict(zip(("loss", "clipped"), function(*arguments), strict=True))


# Other libraries


def thread_per_row(inputs: Inputs) -> Forward:
    from operators.triton_gae import gae  # Triton comes with CUDA builds of torch

    return lambda: gae(inputs)


def trl_selective(inputs: Inputs) -> Forward:
    from trl.trainer.utils import selective_log_softmax

    # TRL's batches are [B, T, V], and on the CPU it loops over B.
    count, vocabulary = inputs["logits"].shape
    rows = 8 if count % 8 == 0 else 1
    logits = inputs["logits"].view(rows, count // rows, vocabulary)
    tokens = inputs["tokens"].view(rows, count // rows)
    return lambda: {"log_probs": selective_log_softmax(logits, tokens).view(-1)}


def trl_chunked(inputs: Inputs) -> Forward:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {
        "log_probs": ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, COLUMNS, None, 1.0, ())[0]
    }


def verl_loop(inputs: Inputs) -> Forward:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    rewards, values = inputs["rewards"], inputs["values"]

    def forward() -> dict[str, torch.Tensor]:
        mask = inputs["mask"].float()  # it subtracts the mask from 1
        whitened, returns = compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
        return {"whitened": whitened, "returns": returns}

    return forward


def liger(inputs: Inputs) -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda: {"loss": liger_cross_entropy(inputs["logits"], inputs["tokens"])}


def liger_linear(inputs: Inputs) -> Forward:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {"loss": liger_fused_linear_cross_entropy(hidden, weight, tokens)}


def apple_cce(inputs: Inputs) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {"loss": linear_cross_entropy(hidden, weight, tokens, filter_eps=None)}


def flash(inputs: Inputs) -> Forward:
    module = _file_of("flash_attn", "ops/triton/cross_entropy.py")
    return lambda: {"loss": module.cross_entropy_loss(inputs["logits"], inputs["tokens"])[0].mean()}


def _file_of(package: str, path: str) -> ModuleType:
    """One file of a package, whose __init__ would want kernels that were not built."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{package}'")
    file = importlib.util.spec_from_file_location("one_file", Path(spec.submodule_search_locations[0]) / path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module
