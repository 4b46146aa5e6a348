"""Run by test_ppo_failures.py in two processes: what goes wrong on the second one alone, and what each then raises."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from ppo_harness import TokenReward, fit, make_module, prompts
from processes import run_cases
from torch import Tensor

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.collectives import all_gather_objects, rank
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rewards import ModelReward, Reward, WeightedSum


class NanOnRankOne(Reward):
    def forward(self, rollout: Rollout) -> Tensor:
        scores = torch.zeros(len(rollout))
        scores[1] = math.nan if rank() == 1 else 0.0
        return scores


class BrokenOnRankOne(Reward):
    def forward(self, rollout: Rollout) -> Tensor:
        return torch.ones(len(rollout)) / (1 if rank() == 0 else {}["no such key"])


def own_rows(rows: int) -> PromptBatch:
    """This process's rows of a global batch, and none where it has none."""
    batch = prompts(rows)
    mine = torch.arange(int(os.environ["RANK"]), rows, 2)  # asked before there is a process group
    return PromptBatch(
        *(getattr(batch, name)[mine] for name in ("tokens", "lengths", "rows", "weights")),
        prompts=[batch.prompts[row] for row in mine],
        columns={},
    )


def bad_logits(policy: Policy) -> None:
    """The logits of every row's third token are NaN."""
    decode, calls = policy.decode, []

    def broken(tokens: Tensor, *arguments: Any, **options: Any) -> Tensor:
        logits = decode(tokens, *arguments, **options)
        if len(tokens) > 1 and tokens.shape[1] == 1:  # not a prompt
            calls.append(1)
        return logits * math.nan if len(calls) == 2 else logits

    policy.decode = broken  # type: ignore[method-assign]


def run(case: dict[str, Any]) -> list[list[str]]:
    """Of each process, the kind of error and its words."""
    name, reward = case["name"], TokenReward()
    if name == "score":
        reward = NanOnRankOne()
    elif name == "exception":
        reward = BrokenOnRankOne()
    elif name.startswith("part"):  # the other process asks the second part's sharded model, whatever the first did
        first = NanOnRankOne() if name == "part" else BrokenOnRankOne()
        reward = WeightedSum([first, ModelReward(case["reward"])], [1.0, 1.0])
    module = make_module(case["policy"], reward)
    build = module.configure_model

    def configure() -> None:
        build()
        if name == "logits" and rank() == 1:
            bad_logits(module.policy)

    module.configure_model = configure
    told = ["none", ""]
    try:
        fit(module, [own_rows(case["rows"])], strategy=case["strategy"], devices=2, use_distributed_sampler=False)
    except Exception as error:
        told = [type(error).__name__, str(error)]
    return all_gather_objects(told)


if __name__ == "__main__":
    run_cases(run)
