"""Random inputs of a case, and the check of what an entrant made of them against float64.

The truth is written here from the definitions, in float64, and shares no code with the package or with any peer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from operators.cases import Case

GAMMA, LAM, CLIP, ENTROPY_WEIGHT = 0.99, 0.95, 0.2, 0.1
# Relative to the norm of the truth: far above what an implementation of that dtype rounds away (products of bfloat16
# summed in bfloat16 reach 2e-2), far below what a missing term would make.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}
ROWS = 1024  # of logits that the truth holds in float64 at a time
# In the order in which the operator takes them; their sizes by the letters of a case's shape.
_HEAD = {"hidden": "NH", "weight": "VH", "tokens": "N"}
_CLIPPED = {"now": "N", "old": "N", "target": "N"}
TENSORS = {
    "token_log_probs": {"logits": "NV", "tokens": "N"},
    "linear_token_log_probs": _HEAD,
    "linear_cross_entropy": _HEAD,
    "gae": {"rewards": "BT", "values": "BT", "mask": "BT"},
    "clipped_policy_loss": _CLIPPED,
    "clipped_value_loss": _CLIPPED,
    "sample_tokens": {"logits": "BV", "draws": "B"},
}
DTYPES = {"tokens": torch.int64, "mask": torch.bool, "draws": torch.float64}  # the others have the case's
DEVIATIONS = {"logits": 3.0, "weight": 0.05, "now": CLIP}  # of the normal numbers; "now" lies around "old"
TRAINED = ("logits", "hidden", "weight", "now")
EDGE = 1e-6  # nearer than this in mass to a token's edge float32 may draw, or keep, its neighbour
MARGIN = 1e-5  # nearer than this to a clip boundary float32 may choose the other branch


@dataclass
class Inputs:
    """The tensors of a case; ``draw`` fills them anew in place, so that timing never waits for fresh memory."""

    case: Case
    tensors: dict[str, Tensor]
    leaves: tuple[Tensor, ...]  # those that get a gradient

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def incoming(self, name: str) -> Tensor:
        """The gradient of the training loss with respect to the output ``name``, one for all entrants.

        The loss is the mean of -log p - ENTROPY_WEIGHT * entropy over the tokens (a peer without an entropy: the mean
        of -log p), and the mean of PPO's losses.
        """
        device = self.leaves[0].device
        count = self.leaves[0].shape[0]
        if name == "loss" and self.case.operator in ("clipped_policy_loss", "clipped_value_loss"):
            return torch.full((count,), 1 / count, device=device)
        if name == "loss":
            return torch.ones((), device=device)
        weight = {"log_probs": -1.0, "entropy": -ENTROPY_WEIGHT}[name]
        return torch.full((count,), weight / count, device=device)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """New random values."""
        generator = torch.Generator(next(iter(self.tensors.values())).device).manual_seed(seed)
        for name, tensor in self.tensors.items():
            if name == "draws":
                tensor.uniform_(generator=generator)
            elif name == "tokens":
                tensor.random_(0, self.case.shape["V"], generator=generator)
            elif name == "mask":
                length = tensor.shape[1]
                ends = torch.empty(len(tensor), 1, device=tensor.device).uniform_(0.5, 1, generator=generator) * length
                tensor.copy_(torch.arange(length, device=ends.device) < ends)
                for padded in ("rewards", "values"):  # 0 past the end: TRL's loop knows no mask and relies on it
                    self[padded].mul_(tensor)
            else:
                tensor.normal_(0, DEVIATIONS.get(name, 1.0), generator=generator)
        if "now" in self.tensors:
            self["now"].add_(self["old"])


def allocate(case: Case, device: str) -> Inputs:
    """Room for the inputs of ``case``; ``draw`` fills it."""
    tensors = {}
    for name, sizes in TENSORS[case.operator].items():
        dtype = DTYPES.get(name, getattr(torch, case.dtype))
        tensors[name] = torch.empty([int(case.shape[size]) for size in sizes], dtype=dtype, device=device)
    trained = [name for name in tensors if name in TRAINED and case.operator != "sample_tokens"]
    return Inputs(case, tensors, tuple(tensors[name].requires_grad_() for name in trained))


class Errors:
    """Distances from the truth, gathered piece by piece: relative to the truth's norm, one number for each tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor, truth: Tensor) -> None:
        sums = self.sums.setdefault(name, [truth.new_zeros(()), truth.new_zeros(())])
        difference = value.detach().to(truth.dtype) - truth
        sums[0] += difference.square().sum()
        sums[1] += truth.square().sum()

    def relative(self) -> dict[str, float]:
        return {name: float((wrong / right).sqrt()) for name, (wrong, right) in self.sums.items()}


@torch.no_grad()
def errors(inputs: Inputs, outputs: dict[str, Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """How far ``outputs`` and ``gradients`` (those of ``inputs.leaves``) are from float64, relative to its norm."""
    for name, tensor in (*outputs.items(), *(("a gradient", gradient) for gradient in gradients)):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return {f"{name}, not finite": float("inf")}
    if inputs.case.operator == "gae":
        return _gae_errors(inputs, outputs)
    if inputs.case.operator == "sample_tokens":
        return _sampling_errors(inputs, outputs)
    if inputs.case.operator.startswith("clipped"):
        return _loss_errors(inputs, outputs, gradients)
    return _log_prob_errors(inputs, outputs, gradients)


def _log_prob_errors(inputs: Inputs, outputs: dict[str, Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """``d log p_y / dz_j = [j = y] - p_j`` and ``dH / dz_j = -p_j (log p_j + H)``, for rows of logits at a time."""
    found, tokens, linear = Errors(), inputs["tokens"], "hidden" in inputs.tensors
    count = tokens.shape[0]
    weight = inputs["weight"].double() if linear else None
    weight_gradient = torch.zeros_like(weight) if linear and gradients else None
    loss = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for start in range(0, count, ROWS):
        part = slice(start, start + ROWS)
        hidden = inputs["hidden"][part].double() if linear else None
        log_p = torch.log_softmax(hidden @ weight.T if linear else inputs["logits"][part].double(), dim=-1)
        truth = log_p.gather(1, tokens[part, None])[:, 0]
        loss -= truth.sum() / count
        p = log_p.exp()
        entropy = -(p * log_p).sum(1)
        for name, value in (("log_probs", truth), ("entropy", entropy)):
            if name in outputs:
                found.add(name, outputs[name].reshape(-1)[part], value)
        if not gradients:
            continue
        gradient = p / count
        gradient.scatter_add_(1, tokens[part, None], torch.full_like(truth[:, None], -1 / count))
        if "entropy" in outputs and outputs["entropy"].requires_grad:
            gradient += ENTROPY_WEIGHT / count * p * (log_p + entropy[:, None])
        if linear:
            found.add("hidden gradient", gradients[0][part], gradient @ weight)
            weight_gradient += gradient.T @ hidden
        else:
            found.add("logits gradient", gradients[0].reshape(count, -1)[part], gradient)
    if "loss" in outputs:
        found.add("loss", outputs["loss"], loss)
    if linear and gradients:
        found.add("weight gradient", gradients[1], weight_gradient)
    return found.relative()


def _gae_errors(inputs: Inputs, outputs: dict[str, Tensor]) -> dict[str, float]:
    """On the counted steps: ``A[t] = sum_k (gamma lam)^k delta[t + k]``, summed from the last step."""
    rewards, values, mask = inputs["rewards"].double(), inputs["values"].double(), inputs["mask"]
    following = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        later = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0  # 0 past a row's end
        following = rewards[:, t] + GAMMA * later - values[:, t] + GAMMA * LAM * following
        advantages[:, t] = following
    counted = advantages[mask]
    truths = {
        "advantages": counted,
        "returns": counted + values[mask],
        "whitened": (counted - counted.mean()) / counted.std(),
    }
    found = Errors()
    for name, value in outputs.items():
        found.add(name, value[mask], truths[name])
    return found.relative()


def _sampling_errors(inputs: Inputs, outputs: dict[str, Tensor]) -> dict[str, float]:
    """The kept tokens by sorting, the draw by its place in their cumulative mass, on rows where float32 can tell both.

    A peer draws by random numbers of its own: its token must be one of those kept, and its probabilities, which may
    keep another of equal logits and, within rounding of top-p's mass, one token more or less, are compared in their
    order.
    """
    shape, logits, tokens, found = inputs.case.shape, inputs["logits"].double(), outputs["tokens"], Errors()
    top_p = shape.get("top_p")
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    kept = ordered >= ordered[:, shape.get("top_k", logits.shape[1]) - 1, None]
    mass = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
    before = mass.cumsum(-1) - mass
    clear = torch.ones_like(kept[:, 0])
    if top_p:
        clear = ((before - top_p).abs() > EDGE).all(-1)
        kept &= before < top_p
    if "probabilities" in outputs:
        count = kept.sum(-1)
        if top_p:
            chosen = (outputs["probabilities"] > 0).sum(-1)
            last = before.gather(-1, chosen[:, None] - 1)[:, 0], (before + mass).gather(-1, chosen[:, None] - 1)[:, 0]
            near = (last[0] < top_p + MARGIN) & (last[1] > top_p - MARGIN)
            count = torch.where(near, chosen, count)
        kept = torch.arange(kept.shape[1], device=kept.device) < count[:, None]
    mass = mass * kept / (mass * kept).sum(-1, keepdim=True)
    if "probabilities" in outputs:
        found.add("probabilities", outputs["probabilities"].sort(-1, descending=True).values, mass)
        right = logits.gather(-1, tokens[:, None])[:, 0] >= ordered.masked_fill(~kept, torch.inf).amin(-1)
        clear = torch.ones_like(clear)
    else:
        cumulative = torch.zeros_like(mass).scatter(-1, order, mass).cumsum(-1)
        clear &= ((cumulative - inputs["draws"][:, None]).abs() > EDGE).all(-1)
        token = (cumulative <= inputs["draws"][:, None]).sum(-1)
        right = tokens == token
        log_p = torch.zeros_like(mass).scatter(-1, order, mass.log()).gather(-1, token[:, None])[:, 0]
        found.add("log_probs", outputs["log_probs"][clear], log_p[clear])
        found.add("entropy", outputs["entropy"][clear], torch.special.entr(mass).sum(-1)[clear])
    found.add("tokens", right[clear].double(), torch.ones_like(mass[clear, 0]))
    return found.relative()


def _loss_errors(inputs: Inputs, outputs: dict[str, Tensor], gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """PPO's losses by cases, away from the boundaries between them."""
    now, old, target = (inputs[name].double() for name in ("now", "old", "target"))
    if inputs.case.operator == "clipped_policy_loss":
        ratio = (now - old).exp()
        high, low = ratio > 1 + CLIP, ratio < 1 - CLIP
        clipped = torch.where(target > 0, high, low)
        bound = torch.where(high, 1 + CLIP, 1 - CLIP)
        loss = -target * torch.where(clipped, bound, ratio)
        slope = torch.where(clipped, 0.0, -target * ratio)
        margin = torch.minimum((ratio - 1 - CLIP).abs(), (ratio - 1 + CLIP).abs())
    else:
        moved = now - old
        free, held = (now - target).abs(), (old + moved.sign() * CLIP - target).abs()
        clipped = (moved.abs() > CLIP) & (held > free)
        loss = 0.5 * torch.where(clipped, held, free).square()
        slope = torch.where(clipped, 0.0, now - target)
        margin = torch.minimum((moved.abs() - CLIP).abs(), (held - free).abs())
    clear = margin > MARGIN
    found = Errors()
    found.add("loss", outputs["loss"][clear], loss[clear])
    found.add("clipped", outputs["clipped"][clear], clipped[clear].double())
    if gradients:
        found.add("gradient", gradients[0][clear], (slope / now.numel())[clear])
    return found.relative()
