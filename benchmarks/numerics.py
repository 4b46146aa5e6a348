"""How far are the operators from float64, next to what torch itself computes from the same inputs?

    python benchmarks/numerics.py [--device cpu|cuda] [--json FILE] [--quick]

Each line is one result of one case: its largest error over the largest true value, and its root mean square error
over the root mean square of the true values; ours, torch's, and the ratio of the latter. The truth is computed in
float64 from the very inputs (16-bit ones included). torch is what people write: log_softmax and gather or
F.cross_entropy of a float32 copy of the logits, their gradients by autograd; for the fused head the matrix product
first, in the dtype of the operands; for GAE and the losses the formulas in eager torch. Prints Markdown tables, and
writes FILE (default: under benchmarks/results, by hardware and date).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import provenance
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_lightning import ops
from rlhf_lightning.ops.clipped_policy_loss import reference as eager_policy_loss
from rlhf_lightning.ops.clipped_value_loss import reference as eager_value_loss
from rlhf_lightning.ops.gae import reference as gae_loop

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Results = dict[str, Tensor]
# A case: its name, its dtype, and the named results of ours, of torch, and in float64.
Case = tuple[str, torch.dtype, Results, Results, Results]

# Logits from standard normal numbers, and a temperature.
LOGITS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "temperature 0.1": (lambda x: 3 * x, 0.1),
    "temperature 1": (lambda x: 3 * x, 1.0),
    "temperature 10": (lambda x: 3 * x, 10.0),
    "offset 1000": (lambda x: 3 * x + 1000, 1.0),
    "logits of 1e4": (lambda x: 1e4 * x, 1.0),
    "logits of 1e30": (lambda x: 1e30 * x, 1.0),
    "one -inf": (lambda x: _masked(3 * x, 1), 1.0),
    "all but eight -inf": (lambda x: _masked(3 * x, x.shape[1] - 8), 1.0),
    "one dominant token": (lambda x: torch.cat([x[:, :-1], x[:, -1:] + 40], 1), 1.0),
}


def _masked(logits: Tensor, count: int) -> Tensor:
    logits[:, :count] = -math.inf
    return logits


def _softmax_results(logits: Tensor, tokens: Tensor, temperature: float, dtype: torch.dtype) -> Results:
    """log_softmax and gather in ``dtype``; the gradients are of the sums of log-probs and of entropies."""
    logits = logits.detach().requires_grad_()
    table = (logits.to(dtype) / temperature).log_softmax(-1)
    log_probs = table.gather(-1, tokens[:, None])[:, 0]
    entropy = -torch.where(table.isinf(), 0.0, table.exp() * table).sum(-1)
    (by_log_probs,) = torch.autograd.grad(log_probs.sum(), logits, retain_graph=True)
    # The definition's own gradient is NaN where p = 0: written out, d entropy / d logit = -p (log p + entropy).
    p = table.detach().exp()
    by_entropy = -torch.where(p > 0, p * (table.detach() + entropy.detach()[:, None]), 0.0) / temperature
    return {
        "log_probs": log_probs,
        "entropy": entropy,
        "grad of log_probs": by_log_probs,
        "grad of entropy": by_entropy.to(logits.dtype),
    }


def token_cases(device: str, quick: bool) -> Iterator[Case]:
    """token_log_probs under every kind of logits."""
    rows, vocabulary = (8, 1000) if quick else (32, 49152)
    for dtype in DTYPES:
        for name, (make, temperature) in LOGITS.items():
            logits = make(torch.randn(rows, vocabulary, dtype=torch.float64)).to(dtype)
            if not (logits.isfinite() | (logits == -math.inf)).all():
                continue  # outside float16's range
            tokens = torch.randint(vocabulary - 8, vocabulary, (rows,)).to(device)
            logits = logits.to(device).requires_grad_()
            log_probs, entropy = ops.token_log_probs(logits, tokens, temperature)
            (by_log_probs,) = torch.autograd.grad(log_probs.sum(), logits, retain_graph=True)
            (by_entropy,) = torch.autograd.grad(entropy.sum(), logits)
            ours = dict(zip(("log_probs", "entropy"), (log_probs, entropy), strict=True))
            ours |= {"grad of log_probs": by_log_probs, "grad of entropy": by_entropy}
            torchs = _softmax_results(logits, tokens, temperature, torch.float32)
            truth = _softmax_results(logits.detach().double(), tokens, temperature, torch.float64)
            yield f"token_log_probs, {name}", dtype, ours, torchs, truth


def _head_results(hidden: Tensor, weight: Tensor, tokens: Tensor, kind: torch.dtype) -> Results:
    """The product in the operands' dtype, cross_entropy in ``kind``; the gradients are of its sum."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    log_probs = -functional.cross_entropy((hidden @ weight.T).to(kind), tokens, reduction="none")
    by_hidden, by_weight = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    return {"log_probs": log_probs, "grad_hidden": by_hidden, "grad_weight": by_weight}


def head_cases(device: str, quick: bool) -> Iterator[Case]:
    """linear_token_log_probs: sums over a long vocabulary, and over many rows."""
    shapes = [(64, 4096, 256), (16, 32768, 256), (16, 262144, 64), (8192, 1024, 64)]
    for dtype in DTYPES:
        for rows, vocabulary, width in [(8, 300, 16)] if quick else shapes:
            hidden = torch.randn(rows, width).to(dtype).to(device).requires_grad_()
            weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).to(device).requires_grad_()
            tokens = torch.randint(vocabulary, (rows,)).to(device)
            log_probs, _ = ops.linear_token_log_probs(hidden, weight, tokens)
            by_hidden, by_weight = torch.autograd.grad(log_probs.sum(), (hidden, weight))
            ours = {"log_probs": log_probs, "grad_hidden": by_hidden, "grad_weight": by_weight}
            torchs = _head_results(hidden, weight, tokens, torch.float32)
            truth = _head_results(hidden.detach().double(), weight.detach().double(), tokens, torch.float64)
            yield f"linear_token_log_probs, N {rows}, V {vocabulary}, H {width}", dtype, ours, torchs, truth


def _loss_results(function: Callable[..., Any], tensors: list[Tensor], options: tuple[float, ...]) -> Results:
    first = tensors[0].detach().requires_grad_()
    loss, _ = function(first, *tensors[1:], *options)
    (grad,) = torch.autograd.grad(loss.sum(), first)
    return {"loss": loss, "gradient": grad}


def small_cases(device: str, quick: bool) -> Iterator[Case]:
    """The clipped losses and GAE."""
    size = 1000 if quick else 1 << 20
    for dtype in DTYPES:
        for name, ours, eager, options in (
            ("clipped_policy_loss", ops.clipped_policy_loss, eager_policy_loss, (0.2, 0.28, 3.0)),
            ("clipped_value_loss", ops.clipped_value_loss, eager_value_loss, (0.2,)),
        ):
            old, target = torch.randn(2, size)
            tensors = [x.to(dtype).to(device) for x in (old + 0.3 * torch.randn(size), old, target)]
            doubles = [x.double() for x in tensors]
            # An element near the edge of the clip may fall on its other side in float64: compared where it does not.
            same = ours(*tensors, *options)[1] == eager(*doubles, *options)[1]
            results = [
                {key: value[same] for key, value in _loss_results(*arguments).items()}
                for arguments in ((ours, tensors, options), (eager, tensors, options), (eager, doubles, options))
            ]
            yield name, dtype, *results
        for rows, steps in [(4, 300)] if quick else [(256, 1024), (4, 16384)]:
            mask = (torch.rand(rows, steps) < 0.9).to(device)
            inputs = [x.to(dtype).to(device) for x in torch.randn(2, rows, steps)]
            names = ("advantages", "returns")
            results = [
                dict(zip(names, function(*tensors, mask, 0.999, 0.99), strict=True))
                for function, tensors in (
                    (ops.gae, inputs),
                    (gae_loop, inputs),
                    (gae_loop, [x.double() for x in inputs]),
                )
            ]
            yield f"gae, [{rows}, {steps}]", dtype, *results


def errors(actual: Tensor, truth: Tensor) -> dict[str, float]:
    """``max`` over the largest finite true value, and ``rms`` over the root mean square of the finite true values."""
    finite = truth.isfinite()
    wrong = (actual.double() - truth)[finite]
    wrong[wrong.isnan()] = math.inf
    scale, typical = truth[finite].abs().max(), truth[finite].square().mean().sqrt()
    if scale < 1e-30:  # zeros, or what no float32 can tell from them
        return {"max": wrong.abs().max().item(), "rms": wrong.square().mean().sqrt().item()}
    return {"max": (wrong.abs().max() / scale).item(), "rms": (wrong.square().mean().sqrt() / typical).item()}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the study itself work?")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = {**provenance.about(options.device, torch.get_num_threads()), "quick": options.quick}
    rows: list[dict[str, Any]] = []
    for cases in (token_cases, head_cases, small_cases):
        print("\n| case | dtype | result | ours: max | rms | torch: max | rms | rms ratio |")
        print("|---|---|---|---|---|---|---|---|")
        for case, dtype, ours, torchs, truth in cases(options.device, options.quick):
            for result, exact in truth.items():
                own, theirs = (errors(x[result].detach(), exact.detach()) for x in (ours, torchs))
                kind = str(dtype).removeprefix("torch.")
                rows.append({"case": case, "dtype": kind, "result": result, "ours": own, "torch": theirs})
                ratio = f"{own['rms'] / theirs['rms']:.2f}" if theirs["rms"] > 0 else "-"
                numbers = " | ".join(f"{x:.2g}" for x in (*own.values(), *theirs.values()))
                print(f"| {case} | {kind} | {result} | {numbers} | {ratio} |", flush=True)
    path = options.json or RESULTS / f"numerics_{provenance.slug(about)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
