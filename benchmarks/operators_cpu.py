"""How long do the operators take on this CPU, next to what torch users write today?

    python benchmarks/operators_cpu.py [--threads 2] [--json benchmarks/results/operators_cpu.json]

Forward and backward, wall time, the median of 20 after 3 to warm up; every competitor does the same work on the same
inputs in the same run. Prints a table; the JSON has hardware, versions and date beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_lightning import ops
from rlhf_lightning.ops.clipped_policy_loss import reference as eager_policy_loss
from rlhf_lightning.ops.clipped_value_loss import reference as eager_value_loss
from rlhf_lightning.ops.gae import reference as gae_loop

N, V, H = 1024, 49152, 576
B, T = 256, 256


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """The median wall time of a call."""
    times = []
    for number in range(repeats + 3):
        began = time.perf_counter()
        function()
        if number >= 3:
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def trained(inputs: list[Tensor], loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A forward and backward pass with fresh gradients."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss().backward()

    return run


def head_rows(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Log-probs from logits, and from hidden states."""
    tokens = torch.randint(V, (N,))
    logits = (3 * torch.randn(N, V)).to(dtype).requires_grad_()
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(V, H)).to(dtype).requires_grad_()

    def eager_with_entropy() -> Tensor:
        table = logits.float().log_softmax(-1)
        entropy = -(table.exp() * table).sum(-1)
        return (entropy - table.gather(-1, tokens[:, None])[:, 0]).mean()

    name = str(dtype).removeprefix("torch.")
    return {
        f"token_log_probs + entropy, {name}": {
            "ours": milliseconds(trained([logits], lambda: sum(ops.token_log_probs(logits, tokens)).mean())),
            "cross_entropy, no entropy": milliseconds(
                trained([logits], lambda: functional.cross_entropy(logits.float(), tokens))
            ),
            "log_softmax, gather, entropy": milliseconds(trained([logits], eager_with_entropy)),
        },
        f"linear_token_log_probs + entropy, {name}": {
            "ours": milliseconds(
                trained([hidden, weight], lambda: sum(ops.linear_token_log_probs(hidden, weight, tokens)).mean())
            ),
            "matmul, cross_entropy, no entropy": milliseconds(
                trained([hidden, weight], lambda: functional.cross_entropy((hidden @ weight.T).float(), tokens))
            ),
        },
    }


def small_rows() -> dict[str, dict[str, float]]:
    """GAE and the losses, against their references in plain PyTorch."""
    rewards, values, old = torch.randn(3, B, T)
    mask = torch.rand(B, T) < 0.9
    now = (old + 0.1 * torch.randn(B, T)).requires_grad_()
    return {
        f"gae, [{B}, {T}]": {
            "ours": milliseconds(lambda: ops.gae(rewards, values, mask, 0.99, 0.95)),
            "loop over T": milliseconds(lambda: gae_loop(rewards, values, mask, 0.99, 0.95)),
        },
        f"clipped_policy_loss, [{B}, {T}]": {
            "ours": milliseconds(trained([now], lambda: ops.clipped_policy_loss(now, old, rewards, 0.2, 0.2)[0].sum())),
            "eager": milliseconds(trained([now], lambda: eager_policy_loss(now, old, rewards, 0.2, 0.2)[0].sum())),
        },
        f"clipped_value_loss, [{B}, {T}]": {
            "ours": milliseconds(trained([now], lambda: ops.clipped_value_loss(now, old, values, 0.2)[0].sum())),
            "eager": milliseconds(trained([now], lambda: eager_value_loss(now, old, values, 0.2)[0].sum())),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = head_rows(torch.float32) | head_rows(torch.bfloat16) | small_rows()
    for name, times in rows.items():
        others = "   ".join(f"{other} {ms:.2f} ms ({ms / times['ours']:.1f}x)" for other, ms in list(times.items())[1:])
        print(f"{name:<42} ours {times['ours']:9.2f} ms   {others}")
    if options.json:
        about = {
            "date": date.today().isoformat(),
            "threads": options.threads,
            "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "shapes": {"N": N, "V": V, "H": H, "B": B, "T": T},
        }
        options.json.write_text(json.dumps({**about, "milliseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
