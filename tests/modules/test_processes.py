"""Two processes, DDP or FSDP2, train to the weights and the metrics of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_cases import run

HERE = Path(__file__).parent
# An epsilon far above rounding: with the usual one, Adam's first steps turn a rounding error of a near-zero gradient
# into a full step.
OPTIMIZER = {"learning_rate": 0.02, "adam_eps": 1e-3, "weight_decay": 0.01}
ARGUMENTS = {
    "sft": OPTIMIZER,
    "reward_model": {**OPTIMIZER, "label_smoothing": 0.1, "centring": 0.01, "seed": 3},
    "dpo": {**OPTIMIZER, "beta": 0.5, "sft_coef": 0.1},
}
# The last batch has one row: with two processes one of them gets a filler.
BATCHES = [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11], [12]]
CASES = [(module, strategy) for module in ARGUMENTS for strategy in ("ddp", "fsdp2")]


def case(module: str, **trainer: object) -> dict:
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0, **trainer}
    name = f"{module}-{trainer.get('strategy')}"
    return {"name": name, "module": module, "arguments": ARGUMENTS[module], "batches": BATCHES, "trainer": options}


def launch(script: Path, argument: Path, processes: int = 2) -> None:
    """Start ``script argument`` as torchrun would, in every process; fails with the output of the first that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])]),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(argument)],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(outputs)[-6000:]


@pytest.fixture(scope="module")
def two(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("two")
    cases = [case(module, strategy=strategy, devices=2) for module, strategy in CASES]
    job = {"folder": str(tiny_policy_dir), "out": str(folder / "out.pt"), "cases": cases}
    (folder / "job.json").write_text(json.dumps(job))
    launch(HERE / "train_cases.py", folder / "job.json")
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def one(tiny_policy_dir: Path) -> dict:
    return {module: run(case(module), str(tiny_policy_dir)) for module in ARGUMENTS}


@pytest.mark.parametrize(("module", "strategy"), CASES)
def test_two_processes_train_to_the_weights_of_one(one: dict, two: dict, module: str, strategy: str) -> None:
    expected, got = one[module]["weights"], two[f"{module}-{strategy}"]["weights"]
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("module", "strategy"), CASES)
def test_two_processes_log_the_metrics_of_one(one: dict, two: dict, module: str, strategy: str) -> None:
    expected, got = one[module]["metrics"], two[f"{module}-{strategy}"]["metrics"]
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if not name.endswith("tokens_per_second"):
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
