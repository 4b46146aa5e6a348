"""The optimizer step's sums: division by the count, NaN refused, norms by network; without a Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.training.gradient_step import GradientStep
from rlhf_lightning.training.optimizer import AdamWOptions, decay_groups


def network(grad: float) -> nn.Linear:
    layer = nn.Linear(3, 1)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, grad)
    return layer


def test_gradients_are_divided_by_the_count_of_all_micro_batches() -> None:
    layer, step = network(6.0), GradientStep()
    step.count(torch.tensor(2.0), torch.tensor(1.0), tokens=torch.tensor(5))
    step.count(torch.tensor(1.0), torch.tensor(1.0), tokens=torch.tensor(7))
    # Lightning has averaged over the two micro-batches, so the sums are twice the gradients that are here.
    assert step.finish(list(layer.parameters()), {}, 2, "step 1", overflows=False) == 12
    assert layer.weight.grad.unique().tolist() == [6.0 * 2 / 3]
    assert step.norm == pytest.approx(4.0 * math.sqrt(4))


def test_a_step_without_a_count_follows_one_with_it() -> None:
    layer, step = network(6.0), GradientStep()
    step.count(torch.tensor(3.0), torch.tensor(1.0))
    step.finish(list(layer.parameters()), {}, 1, "step 1", overflows=False)
    step.finish(list(layer.parameters()), {}, 1, "step 2", overflows=False)
    assert layer.weight.grad.unique().tolist() == [2.0]


def test_without_a_count_gradients_stay_and_norms_are_taken_by_network() -> None:
    one, two, step = network(1.0), network(2.0), GradientStep()
    step.finish([*one.parameters(), *two.parameters()], {"two": two}, 4, "step 1", overflows=False)
    assert one.weight.grad.unique().tolist() == [1.0]
    assert step.norms == {"two": pytest.approx(4.0)}
    assert step.norm == pytest.approx(math.sqrt(4 + 16))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_refused_and_forgotten(what: str) -> None:
    layer, step = network(math.nan if what == "gradient" else 1.0), GradientStep()
    step.check(torch.tensor(math.inf if what == "loss" else 1.0))
    with pytest.raises(TrainingDiverged, match=f"the {what} is NaN or infinite at step 7"):
        step.finish(list(layer.parameters()), {}, 1, "step 7", overflows=False)
    if what == "gradient":
        step.finish(list(layer.parameters()), {}, 1, "step 7", overflows=True)
    else:
        step.finish(list(layer.parameters()), {}, 1, "step 8", overflows=False)


def test_matrices_alone_decay() -> None:
    layer = nn.Linear(3, 2)
    matrices, rest = decay_groups(layer.parameters(), 0.1, 0.5)
    assert matrices["weight_decay"] == 0.5 and [p.ndim for p in matrices["params"]] == [2]
    assert rest["weight_decay"] == 0.0 and [p.ndim for p in rest["params"]] == [1]


def test_the_rate_warms_up_and_falls() -> None:
    options = AdamWOptions(warmup_steps=2, schedule="linear")
    assert [options.factor(step, lambda: 6) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ZeroDivisionError):  # the length is asked for only where it matters
        options.factor(3, lambda: 1 // 0)
    assert options.factor(2, lambda: 1 // 0) == 1.0
