"""What the profile of whole steps puts in the operators' place computes what they do, and is counted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import assert_near

from rlhf_lightning.ops import clipped_value_loss, linear_cross_entropy, linear_token_log_probs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import profile_steps  # noqa: E402
from profile_steps import table  # noqa: E402
from training.sizes import SIZES, save_random  # noqa: E402
from training.steps import (  # noqa: E402
    OperatorClock,
    operator,
    plain_cross_entropy,
    plain_log_probs,
    random_batches,
    replace_everywhere,
)


def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4).requires_grad_(), torch.randn(9, 4).requires_grad_(), torch.randint(9, (6,))


def test_a_clock_around_an_operator_changes_neither_results_nor_gradients() -> None:
    hidden, weight, tokens = head()
    clock = OperatorClock()
    timed = clock.wrap("head", linear_token_log_probs)
    found = []
    for clock.on in (False, True):
        log_probs, entropy = timed(hidden, weight, tokens, 0.7)
        found.append((log_probs, entropy, *torch.autograd.grad(log_probs.sum() - entropy.sum(), (hidden, weight))))
    assert all(map(torch.equal, *found))
    spent = clock.spent["head"]
    assert spent["calls"] == 1 and spent["forward_ms"] > 0 and spent["backward_ms"] > 0


def test_a_result_without_use_and_an_operand_without_gradient_pass_the_clock() -> None:
    values, old, returns = torch.randn(3, 8)
    clock = OperatorClock()
    clock.on = True
    loss, clipped = clock.wrap("loss", clipped_value_loss)(values.requires_grad_(), old, returns, 0.2)
    (grad,) = torch.autograd.grad(loss.sum(), values)
    truth = torch.where(clipped, 0.0, values - returns)
    assert_near(grad, truth, torch.float32)


def test_an_operator_is_replaced_wherever_the_package_imported_it() -> None:
    from rlhf_lightning.models import head as module

    original, stand_in = operator("linear_token_log_probs"), object()
    assert original is linear_token_log_probs and module.linear_token_log_probs is original
    replace_everywhere(original, stand_in)
    try:
        assert module.linear_token_log_probs is stand_in
    finally:
        replace_everywhere(stand_in, original)


@pytest.mark.parametrize("entropy_logged", [False, True])
def test_the_head_as_people_write_it_is_the_same_function(entropy_logged: bool) -> None:
    hidden, weight, tokens = head()
    found = []
    for function in (linear_token_log_probs, plain_log_probs(entropy_logged)):
        log_probs, entropy = function(hidden, weight, tokens, 0.7)
        found.append((log_probs, entropy, *torch.autograd.grad(log_probs.sum(), (hidden, weight))))
    for place, (ours, plain) in enumerate(zip(*found, strict=True)):
        if place != 1 or entropy_logged:
            assert_near(plain, ours.detach(), torch.float32, times=10)


def test_the_cross_entropy_as_people_write_it_is_the_same_function() -> None:
    hidden, weight, tokens = head()
    token_weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.0, 3.0])
    found = []
    for function in (linear_cross_entropy, plain_cross_entropy):
        loss, log_probs, _ = function(hidden, weight, tokens, token_weights, 0.7)
        found.append((loss, log_probs, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, plain in zip(*found, strict=True):
        assert_near(plain, ours.detach(), torch.float32, times=10)


def way(bare: list[float], clocked: list[float], spent: float) -> dict:
    taken = {"calls": 1, "forward_ms": spent, "backward_ms": 0.0}
    return {
        "step_ms": bare,
        "clocked_step_ms": clocked,
        "peak_mib": 1.0,
        "phases_ms": {},
        "operators": {"gae": taken},
    }


def rows(ways: dict) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(ways) if line]
    return {name: rest for name, *rest in cells}


def test_shares_are_of_the_clocked_steps_and_the_gain_is_of_the_bare_ones() -> None:
    found = rows(
        {
            "native": way([90.0] * 4, [95.0] * 4, 9.5),
            "reference": way([100.0] * 4, [110.0] * 4, 33.0),
            "plain": way([120.0] * 4, [125.0] * 4, 25.0),
        }
    )
    # 9.5 of 95, 33 of 110, 25 of 125; saved are 23.5 of 110 and 15.5 of 125.
    assert found["gae"] == ["1", "9.50 (10.0%)", "33.00 (30.0%)", "25.00 (20.0%)", "+21%", "+12%"]
    assert found["the native step gained"] == ["", "+10%", "+25%"]
    assert found["all else"][1:4] == ["86", "77", "100"]


def test_a_gain_is_nothing_where_steps_differ_as_much_by_themselves() -> None:
    scattered = [60.0, 90.0, 110.0, 140.0]
    found = rows(
        {
            "native": way([90.0] * 4, [90.0] * 4, 5.0),
            "reference": way([100.0] * 4, [100.0] * 4, 15.0),
            "plain": way(scattered, scattered, 15.0),
        }
    )
    assert found["gae"][-2:] == ["+10%", "nothing"]
    assert found["the native step gained"] == ["", "+10%", "nothing"]


def test_a_way_whose_clocked_and_bare_steps_differ_is_called_unsteady() -> None:
    found = rows(
        {
            "native": way([90.0] * 4, [95.0] * 4, 9.5),
            "reference": way([100.0] * 4, [105.0] * 4, 21.0),
            "plain": way([220.0] * 4, [100.0] * 4, 20.0),
        }
    )
    assert found["gae"] == ["1", "9.50 (10.0%)", "21.00 (20.0%)", "20.00 (unsteady)", "+11%", "unsteady"]
    assert found["the native step gained"] == ["", "+10%", "unsteady"]
    assert found["clocked step, ms"] == ["95", "105", "100 (unsteady)"]


@pytest.mark.parametrize(("task", "size"), [("ppo", "16m"), ("dpo", "demo")])
def test_the_file_has_the_form_of_the_committed_ones_and_says_which_filter(
    task: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {name: way([90.0] * 4, [95.0] * 4, 9.5) for name in profile_steps.WAYS}
    given: list[dict] = []
    monkeypatch.setattr(profile_steps, "measure", lambda options, ppo: given.append(ppo) or ways)
    target = tmp_path / "profile.json"
    command = ["profile_steps.py", "--task", task, "--size", size, "--json", str(target)]
    (committed,) = (ROOT / "benchmarks" / "results").glob(f"profile_{task}_{size}_*.json")
    wanted = json.loads(committed.read_text(encoding="utf-8"))
    for more in ([], ["--top-k", "50"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        profile_steps.main()
        found = json.loads(target.read_text(encoding="utf-8"))
        assert set(found) == set(wanted) and set(found["about"]) == set(wanted["about"])
        ppo = {**wanted["about"]["size"]["ppo"], **({"top_k": 50} if more else {})}
        assert found["about"]["size"] == {**wanted["about"]["size"], "ppo": ppo} and given[-1] == ppo
        assert (
            f"A Llama of random weights, {found['about']['size']['layers']} layers"
            in target.with_suffix(".md").read_text()
        )


@pytest.mark.parametrize("task", ["ppo", "sft", "dpo"])
def test_batches_are_random_and_fresh_in_every_step(task: str, tmp_path: Path) -> None:
    size = replace(SIZES["tiny"], prompts=3, rows=4)
    save_random(size, tmp_path)
    first, second = random_batches(str(tmp_path), task, size, 2)
    assert len(first) == len(second) == (3 if task == "ppo" else 4)
    sides = [batch.chosen if task == "dpo" else batch for batch in (first, second)]
    assert sides[0].tokens.shape != sides[1].tokens.shape or not torch.equal(sides[0].tokens, sides[1].tokens)
