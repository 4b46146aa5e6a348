"""The collective helpers in one process and in two, and the fsdp2 strategy's size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from processes import launch
from torch import nn

from rlhf_lightning.collectives import (
    all_gather_objects,
    all_reduce_max,
    all_reduce_sum,
    any_true,
    failing_together,
    grad_norm,
    rank,
    scale_grads,
    world_size,
)
from rlhf_lightning.distributed import FSDP2Strategy


def test_one_process_needs_no_group() -> None:
    given = torch.tensor([1.5, 2.0])
    total = all_reduce_sum(given)
    total += 1.0
    assert given.tolist() == [1.5, 2.0] and total.tolist() == [2.5, 3.0]
    assert all_reduce_max(given).tolist() == [1.5, 2.0]
    assert (any_true(True), any_true(False), rank(), world_size()) == (True, False, 0, 1)
    assert all_gather_objects("a") == ["a"]
    with pytest.raises(KeyError), failing_together():
        raise KeyError("mine")


def test_grad_norm_by_hand_and_scaling() -> None:
    layers = nn.ParameterList([torch.zeros(2), torch.zeros(1), torch.zeros(1)])
    layers[0].grad, layers[1].grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0])
    assert grad_norm(layers) == pytest.approx(3.0)
    scale_grads(layers, 0.5)
    assert layers[0].grad.tolist() == [0.5, 1.0] and layers[2].grad is None
    layers[1].grad[0] = math.nan
    assert math.isnan(grad_norm(layers))
    assert grad_norm([]) == 0.0


def test_two_processes(tmp_path: Path) -> None:
    launch(Path(__file__).with_name("distributed_cases.py"), tmp_path / "seen")
    seen = [json.loads((tmp_path / f"seen.{number}").read_text()) for number in (0, 1)]
    for number, got in enumerate(seen):
        assert (got["rank"], got["world"]) == (number, 2)
        assert got["sum"] == [2.0 + 1e-12, 4.0]  # in float64: float32 would lose the 1e-12
        assert got["given"] == [1.0 + 1e-12 * number, 2.0]
        assert got["max"] == [1, 0]
        assert got["any"] == [False, True]
        assert got["gathered"] == ["process 0", "process 1"]
        other = ["KeyError", "'other'"] if number == 1 else ["RuntimeError", "process 1: KeyError: 'other'"]
        known = [["InputError", "process 1: wrong"], ["TrainingDiverged", "process 1: NaN"]]
        assert got["failures"] == [None, *known, other]
        assert got["norm"] == pytest.approx(math.sqrt(15))  # of all shards, the same on both
        assert got["scaled"] == pytest.approx(math.sqrt(15) / 2)


def test_fsdp2_is_a_name_that_trainers_know() -> None:
    assert StrategyRegistry["fsdp2"]["strategy"] is FSDP2Strategy
    options = {"logger": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", **options)
    assert isinstance(trainer.strategy, FSDP2Strategy)
    assert trainer.strategy._tensor_parallel_size == 1
