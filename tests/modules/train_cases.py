"""Run by test_processes.py in two processes: trains every case on the command line's JSON file, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from small_data import SmallData, train

from rlhf_lightning.distributed import rank
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule

MODULES = {"sft": SFTModule, "reward_model": RewardModelModule, "dpo": DPOModule}


def run(case: dict, folder: str) -> dict:
    module = MODULES[case["module"]](model=folder, **case["arguments"])
    weights = train(module, SmallData(folder, case["batches"], held_out=True), **case["trainer"])
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    return {"weights": weights, "metrics": metrics}


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {case["name"]: run(case, job["folder"]) for case in job["cases"]}
    if rank() == 0:
        torch.save(results, job["out"])


if __name__ == "__main__":
    main()
