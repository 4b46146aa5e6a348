"""Run by test_distributed.py in two processes: what each one sees goes into a JSON file of its own."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlhf_lightning.collectives import (
    all_gather_objects,
    all_reduce_max,
    all_reduce_sum,
    any_true,
    barrier,
    failing_together,
    grad_norm,
    rank,
    scale_grads,
    world_size,
)
from rlhf_lightning.errors import InputError, TrainingDiverged


def main() -> None:
    dist.init_process_group("gloo")
    number = rank()
    given = torch.tensor([1.0 + 1e-12 * number, 2.0], dtype=torch.float64)
    seen = {
        "rank": number,
        "world": world_size(),
        "sum": all_reduce_sum(given).tolist(),
        "given": given.tolist(),
        "max": all_reduce_max(torch.tensor([number, -number])).tolist(),
        "any": [any_true(False), any_true(number == 1)],
        "gathered": all_gather_objects(f"process {number}"),
        "failures": [],
    }
    for error in (None, InputError("wrong"), TrainingDiverged("NaN"), KeyError("other")):
        try:
            with failing_together():
                if number == 1 and error is not None:
                    raise error
            seen["failures"].append(None)
        except Exception as raised:
            seen["failures"].append([type(raised).__name__, str(raised)])
    torch.manual_seed(0)
    layer = fully_shard(nn.Linear(3, 5, bias=False), mesh=init_device_mesh("cpu", (2,)))
    layer(torch.ones(1, 3)).sum().backward()  # every gradient is 1, on both processes, and averaged
    seen["norm"] = grad_norm(layer.parameters())
    scale_grads(layer.parameters(), 0.5)
    seen["scaled"] = grad_norm(layer.parameters())
    barrier()
    with open(f"{sys.argv[1]}.{number}", "w") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main()
