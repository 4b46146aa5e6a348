"""Two processes, DDP or FSDP2, train to the weights and the metrics of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import results_of
from train_cases import run

# An epsilon far above rounding: with the usual one, Adam's first steps turn a rounding error of a near-zero gradient
# into a full step.
OPTIMIZER = {"optimizer": {"learning_rate": 0.02, "eps": 1e-3, "weight_decay": 0.01}}
ARGUMENTS = {
    "sft": OPTIMIZER,
    "sft-compiled": {**OPTIMIZER, "network": {"compile_layers": True}},
    "reward_model": {**OPTIMIZER, "label_smoothing": 0.1, "centring": 0.01, "seed": 3},
    "dpo": {**OPTIMIZER, "beta": 0.5, "sft_coef": 0.1},
    "dpo-lora": {**OPTIMIZER, "beta": 0.5, "lora": {"rank": 4}},
    "kto": {**OPTIMIZER, "beta": 0.5, "desirable_weight": 1.5},
    "kto-labelled": {**OPTIMIZER, "beta": 0.5, "desirable_weight": 1.5},
    "orpo": {**OPTIMIZER, "odds_coef": 0.5},
    "simpo": OPTIMIZER,
}
# The last batch has one row: with two processes one of them gets a filler.
BATCHES = [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11], [12]]
CASES = [(module, strategy) for module in ARGUMENTS for strategy in ("ddp", "fsdp2")]


def case(folder: Path, module: str, **trainer: object) -> dict:
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0, **trainer}
    arguments = ARGUMENTS[module]
    return {"model": str(folder), "module": module, "arguments": arguments, "batches": BATCHES, "trainer": options}


@pytest.fixture(scope="module")
def two(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    cases = {
        f"{module}-{strategy}": case(tiny_policy_dir, module, strategy=strategy, devices=2)
        for module, strategy in CASES
    }
    return results_of("train_cases.py", cases, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tiny_policy_dir: Path) -> dict:
    return {module: run(case(tiny_policy_dir, module)) for module in ARGUMENTS}


@pytest.mark.parametrize(("module", "strategy"), CASES)
def test_two_processes_train_to_the_weights_of_one(one: dict, two: dict, module: str, strategy: str) -> None:
    expected, got = one[module]["weights"], two[f"{module}-{strategy}"]["weights"]
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_layers_train_to_the_same_weights(one: dict) -> None:
    for name, weight in one["sft"]["weights"].items():
        found = one["sft-compiled"]["weights"][name]
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("module", "strategy"), CASES)
def test_two_processes_log_the_metrics_of_one(one: dict, two: dict, module: str, strategy: str) -> None:
    expected, got = one[module]["metrics"], two[f"{module}-{strategy}"]["metrics"]
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if not name.endswith("tokens_per_second"):
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name
