"""One training of SFT, a reward model or a method on pairs; test_processes.py runs it in one process and in two."""

from __future__ import annotations

from typing import Any

from making import make
from processes import run_cases
from small_data import SmallData, train

from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.orpo import ORPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.simpo import SimPOModule

MODULES = {
    "sft": SFTModule,
    "sft-compiled": SFTModule,
    "reward_model": RewardModelModule,
    "dpo": DPOModule,
    "dpo-lora": DPOModule,
    "kto": KTOModule,
    "kto-labelled": KTOModule,
    "orpo": ORPOModule,
    "simpo": SimPOModule,
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    module = make(MODULES[case["module"]], case["model"], **case["arguments"])
    labelled = case["module"].endswith("-labelled")
    data = SmallData(case["model"], case["batches"], held_out=True, labelled=labelled)
    weights = train(module, data, **case["trainer"])
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    return {"weights": weights, "metrics": metrics}


if __name__ == "__main__":
    run_cases(run)
