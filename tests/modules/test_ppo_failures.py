"""What goes wrong on one process of two is raised on both, at once: none waits for the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import results_of

TOLD = {
    "logits": (
        "TrainingDiverged",
        "process 1: the policy's logits were NaN or infinite while sampling token 2 of prompt row 1 in iteration 0",
    ),
    "score": ("InputError", "process 1: reward Recorder.score: the score of response 1 is nan"),
    "exception": ("RuntimeError", "process 1: KeyError: 'no such key'"),
    "part": ("InputError", "process 1: reward NanOnRankOne: the score of response 1 is nan"),
    "part that raises": ("RuntimeError", "process 1: KeyError: 'no such key'"),
    "no rows": ("InputError", "process 1: data: a batch without prompts; give every process at least one row"),
}
CASES = [(name, strategy) for name in TOLD for strategy in ("ddp", "fsdp2")]


@pytest.fixture(scope="module")
def seen(tiny_policy_dir: Path, tiny_reward_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    models = {"policy": str(tiny_policy_dir), "reward": str(tiny_reward_dir)}
    cases = {
        f"{name}-{strategy}": {**models, "name": name, "strategy": strategy, "rows": 1 if name == "no rows" else 8}
        for name, strategy in CASES
    }
    return results_of("failure_cases.py", cases, tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_both_processes_raise_what_went_wrong_on_one(seen: dict, name: str, strategy: str) -> None:
    kind, words = TOLD[name]
    first, second = seen[f"{name}-{strategy}"]
    assert first[0] == kind and first[1].startswith(words)
    # An exception of somebody else's is kept as it is where it happened.
    assert second == (["KeyError", "'no such key'"] if kind == "RuntimeError" else first)
