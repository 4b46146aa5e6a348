"""The process of one point of `training_growth.py`.

python -m training.point SIZES DEVICE THREADS FOLDER OUT
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from training import ours
from training.meter import MIB, Meter
from training.sizes import Size, fill


class Counting(Meter):
    """Also counts, in the steps taken apart, the bytes that the update's passes keep for their backwards."""

    saved_bytes = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name):
            if name != "update" or self.steps < self.warm_up + self.timed:
                yield
                return
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                whole = tensor if tensor._base is None else tensor._base
                if not (whole.is_leaf and whole.requires_grad):  # a parameter, or a view of one
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            self.saved_bytes = sum(kept.values())


def main() -> None:
    changed, device, threads, folder, out = sys.argv[1:]
    torch.set_num_threads(int(threads))
    size = Size(
        **{"hidden": 128, "intermediate": 352, "layers": 2, "heads": 2, "kv_heads": 2, "minibatches": 1},
        **json.loads(changed),
    )
    fill(size, Path(folder))
    meter = Counting(device, warm_up=2, timed=5, apart=1)
    measured = ours.run("ppo", size, Path(folder), device, "float32", meter, seed=0)
    seconds = statistics.median(measured["seconds"])
    Path(out).write_text(json.dumps({"seconds": seconds, "activations_mb": meter.saved_bytes / MIB}))


if __name__ == "__main__":
    main()
