"""Rewards: Python functions, sums, ensembles, and what a wrong score gets."""

import json
import math
import sys

import pytest
import torch

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards import FunctionReward, Reward, WeightedSum
from rlhf_lightning.rewards.base import check_scores


def make_rollout(responses: list[str], /, **columns: list) -> Rollout:
    rows = len(responses)
    prompts = PromptBatch(
        tokens=torch.ones(rows, 2, dtype=torch.int64),
        lengths=torch.full((rows,), 2),
        rows=torch.arange(rows),
        weights=torch.ones(rows),
        prompts=[f"prompt {i}" for i in range(rows)],
        columns=columns,
    )
    return Rollout(
        prompts=prompts,
        tokens=torch.ones(rows, 4, dtype=torch.int64),
        lengths=torch.full((rows,), 4),
        prompt_lengths=prompts.lengths,
        log_probs=torch.zeros(rows, 2),
        truncated=torch.zeros(rows, dtype=torch.bool),
        responses=responses,
    )


class Constant(Reward):
    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, rollout):
        return self.scores


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "def brevity(prompts, responses, **columns):\n    return [-len(r) for r in responses]\n"
        "def closeness(prompts, responses, target):\n    return [-abs(len(r) - t) for r, t in zip(responses, target)]\n"
        "def broken(prompts, responses):\n    raise KeyError('lexicon')\n"
        "def short(prompts, responses):\n    return [1.0]\n"
        "def words(prompts, responses):\n    return ['good'] * len(responses)\n"
        "def infinite(prompts, responses):\n    return [0.0, float('nan')]\n"
        "LIMIT = 3\n"
    )
    return path


def test_a_function_is_called_with_texts_and_columns(reward_file):
    rollout = make_rollout(["ab", "abcd"], target=[2, 3], other=["x", "y"])
    assert FunctionReward(f"{reward_file}:brevity")(rollout).tolist() == [-2.0, -4.0]
    assert FunctionReward(f"{reward_file}:closeness")(rollout).tolist() == [0.0, -1.0]


def test_a_file_may_hold_dataclasses_and_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lexicon_beside_it.py").write_text("GOOD = {'nice'}\n")
    path = tmp_path / "json.py"  # its name is a package's, which must stay what it is
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from lexicon_beside_it import GOOD\n"
        "@dataclass\nclass Word:\n    text: str\n    known: ClassVar[set[str]] = GOOD\n"
        "def nice(prompts, responses):\n    return [Word(r).text in Word.known for r in responses]\n"
    )
    assert FunctionReward(f"{path}:nice")(make_rollout(["nice", "bad"])).tolist() == [1.0, 0.0]
    assert sys.modules["json"] is json


def test_a_function_can_come_from_a_module():
    assert FunctionReward("math:prod").function is math.prod


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "KeyError.*lexicon"),
        ("short", r"each of 2 responses, got shape \(1,\)"),
        ("words", "expected 2 numbers, got list"),
        ("infinite", "score of response 1 is nan.*row 1: prompt 'prompt 1', response 'b'"),
    ],
)
def test_wrong_results_are_named_with_their_function(reward_file, name, message):
    with pytest.raises(InputError, match=message) as caught:
        FunctionReward(f"{reward_file}:{name}")(make_rollout(["a", "b"]))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "expected file.py:name or package.module:name"),
        ("missing.py:f", "does not exist"),
        ("no.such.module:f", "ModuleNotFoundError"),
        ("{file}:LIMIT", "no function 'LIMIT'; its functions: .*brevity"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(reward_file, name, message):
    with pytest.raises(InputError, match=message):
        FunctionReward(name.format(file=reward_file))


def test_weighted_sum_by_hand():
    reward = WeightedSum([Constant(torch.tensor([1.0, 2.0])), Constant([10, 20])], weights=[0.5, -0.1])
    torch.testing.assert_close(reward(make_rollout(["a", "b"])), torch.tensor([-0.5, -1.0]))


def test_a_part_with_the_wrong_length_does_not_broadcast():
    with pytest.raises(InputError, match="each of 2 responses"):
        WeightedSum([Constant([1.0, 2.0]), Constant([1.0])], weights=[1.0, 1.0])(make_rollout(["a", "b"]))


def test_combinations_check_their_options():
    with pytest.raises(InputError, match="at least one"):
        WeightedSum([], [])
    with pytest.raises(InputError, match="2 rewards, got 1"):
        WeightedSum([Constant([1.0]), Constant([1.0])], weights=[1.0])


def test_scores_are_detached_fp32():
    scores = check_scores(torch.ones(2, dtype=torch.float64, requires_grad=True), make_rollout(["a", "b"]), "test")
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert check_scores([True, 0], make_rollout(["a", "b"]), "test").tolist() == [1.0, 0.0]
