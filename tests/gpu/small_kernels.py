"""Every kernel once and more, on odd sizes: what compute-sanitizer watches.

    export PYTHONPATH=.:tests
    compute-sanitizer --tool racecheck --kernel-regex kns=rlhf_lightning python tests/gpu/small_kernels.py

Few elements, since racecheck is a hundred times slower than the GPU.
"""

from __future__ import annotations

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

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    count = 0
    for dtype in DTYPES:
        for call in calls(dtype):
            call.to(device).run()
            count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls made")


if __name__ == "__main__":
    main()
