"""The process of one side: trains a few steps and writes what the meter saw.

python -m training.worker SIDE TASK SIZE DEVICE PRECISION THREADS SEED WARM_UP TIMED APART eager|compiled FOLDER OUT
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from transformers.models.llama import modeling_llama  # noqa: F401, so that it counts among the libraries

from training.entrants import ENTRANTS
from training.meter import Meter
from training.sizes import size_of


def main() -> None:
    name, task, size, device, precision, threads, seed, warm_up, timed, apart, layers, folder, out = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(int(seed))
    entrant = ENTRANTS[name]
    side = importlib.import_module(f"training.{entrant.module}")
    versions = entrant.versions()
    meter = Meter(device, int(warm_up), int(timed), int(apart), "other" if task == "ppo" else "update")
    options = entrant.compiled if layers == "compiled" else {}
    measured = side.run(task, size_of(size, device), Path(folder), device, precision, meter, int(seed), **options)
    Path(out).write_text(json.dumps({**measured, "versions": versions}))


if __name__ == "__main__":
    main()
