"""Every kernel once and more, on odd sizes: what compute-sanitizer watches.

    export PYTHONPATH=.:tests
    export RLHF_LIGHTNING_OPS=native
    python tests/gpu/small_kernels.py --names
    compute-sanitizer --tool racecheck --kernel-regex kns=rlhf_lightning python tests/gpu/small_kernels.py float32

Few elements, since racecheck is a hundred times slower than the GPU. ``--names`` makes sure, with torch.profiler, that
each operator launches kernels of the name that compute-sanitizer is told to watch. Not under compute-sanitizer itself:
the two cannot listen to one process.
"""

from __future__ import annotations

import argparse
import sys

import torch
from gpu.cases import (
    Call,
    make_cross_entropy,
    make_gae,
    make_linear,
    make_policy_loss,
    make_sampling,
    make_token_log_probs,
    make_value_loss,
)
from gpu.launches import OURS, launched

DTYPES = ("float32", "bfloat16", "float16", "float64")


def calls(dtype: torch.dtype) -> list[Call]:
    """One element, less than a warp, a block and a bit, several blocks; a few long rows and many short ones."""
    found = [make_gae(rows, steps, dtype) for rows, steps in ((1, 1), (3, 33), (2, 3001), (130, 17), (2, 9000))]
    found += [make_token_log_probs(rows, size, dtype) for rows, size in ((1, 1), (3, 7), (5, 1031), (2, 33000))]
    found += [make_linear(*size, dtype) for size in ((1, 1, 1), (5, 8, 131), (130, 16, 1031))]
    found += [make_cross_entropy(*size, dtype) for size in ((5, 8, 131), (130, 16, 1031))]
    found += [make_sampling(*size, dtype) for size in ((1, 1), (3, 33), (2, 5003))]
    for size in (1, 31, 1027, 9001):
        found += [make_policy_loss(size, dtype=dtype), make_policy_loss(size, dtype=dtype, dual=None)]
        found += [make_value_loss(size, dtype=dtype), make_value_loss(size, dtype=dtype, clip=None)]
    return found


def unseen(dtype: torch.dtype, device: str) -> list[str]:
    """The operators that launched none of our kernels."""
    made: dict[str, list[Call]] = {}
    for call in calls(dtype):
        made.setdefault(call.operator, []).append(call.to(device))
    launched(made["gae"][0].run)  # the first profile of a process may come too late for its first kernels
    found = []
    for operator, several in made.items():
        ours = {name for name in launched(lambda several=several: [c.run() for c in several]) if OURS in name}
        print(f"{operator}: {len(ours)} kernels")
        if not ours:
            found.append(operator)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dtypes", nargs="*", metavar="DTYPE", help=f"of {', '.join(DTYPES)}; all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--names", action="store_true", help="fail unless every operator launches a kernel of ours")
    options = parser.parse_args(arguments)
    if unknown := set(options.dtypes) - set(DTYPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    count = 0
    for dtype in (getattr(torch, name) for name in options.dtypes or DTYPES):
        if options.names:
            if found := unseen(dtype, options.device):
                print(f"no kernel named {OURS} was launched by {', '.join(found)} ({dtype})")
                return 1
            continue
        for call in calls(dtype):
            call.to(options.device).run()
            count += 1
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("every operator launches its kernels" if options.names else f"{count} calls made")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
