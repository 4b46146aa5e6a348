"""PPO in two processes, DDP or FSDP2, samples and learns what one does; a resumed run is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from making import merged
from ppo_cases import run, write_prompts
from processes import results_of

# Adam's epsilon far above rounding, so that a rounding error in a near-zero gradient does not become a whole step.
OPTIONS = {
    "iterations": 3,
    "kl": {"target": 1.0},
    "update": {"epochs": 2, "minibatches": 2},
    "optimizer": {"eps": 1e-3, "learning_rate": 3e-3},
}
KINDS = {
    "own-critic": {"scores": {"normalise": True}, "critic": {"kind": "model"}, "advantages": {"whiten_rewards": True}},
    "head": {"critic": {"kind": "head"}},
    "warm-up": {"critic": {"kind": "model", "warmup": 2}},
    "head-warm-up": {"critic": {"kind": "head", "warmup": 1}},
    "lora": {"critic": {"kind": "head"}, "lora": {"rank": 4}},
    # Fewer prompts than processes, in training and in the last batch of validation.
    "one-row": {"update": {"minibatches": 1}},
}
ROWS = {"one-row": 1}  # of an iteration; else 5: two processes have three and two
CASES = [(kind, strategy) for kind in KINDS for strategy in ("ddp", "fsdp2")]
UNTIMED = ("time/", "rollout/tokens_per_second")


def case(policy: Path, reward: Path, data: Path, kind: str, **trainer: object) -> dict:
    return {
        "policy": str(policy),
        "reward": str(reward),
        "data": str(data),
        "batch_size": ROWS.get(kind, 5),
        "validate": kind == "one-row",
        "options": merged(OPTIONS, KINDS[kind]),
        "trainer": trainer,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_prompts(path)
    return path


@pytest.fixture(scope="module")
def one(tiny_policy_dir, tiny_reward_dir, data) -> dict:
    return {kind: run(case(tiny_policy_dir, tiny_reward_dir, data, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def two(tiny_policy_dir, tiny_reward_dir, data, tmp_path_factory) -> dict:
    cases = {
        f"{kind}-{strategy}": case(tiny_policy_dir, tiny_reward_dir, data, kind, strategy=strategy, devices=2)
        for kind, strategy in CASES
    }
    return results_of("ppo_cases.py", cases, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_two_processes_sample_what_one_does(one, two, kind, strategy):
    assert two[f"{kind}-{strategy}"]["samples"] == one[kind]["samples"]


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_two_processes_train_to_the_weights_and_metrics_of_one(one, two, kind, strategy):
    expected, got = one[kind], two[f"{kind}-{strategy}"]
    assert expected["weights"].keys() == got["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            got["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for iteration, metrics in enumerate(expected["metrics"]):
        for name, value in metrics.items():
            if not name.startswith(UNTIMED):
                close = pytest.approx(value, rel=2e-3, abs=1e-5, nan_ok=True)
                assert got["metrics"][iteration][name] == close, (iteration, name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROWS])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_policy_dir, tiny_reward_dir, data, tmp_path, kind):
    plain = case(tiny_policy_dir, tiny_reward_dir, data, kind)
    saved = run({**plain, "checkpoints": True, "folder": str(tmp_path / "whole")})
    assert saved["samples"] == run(plain)["samples"]
    for checkpoint in sorted((tmp_path / "whole").rglob("batch-*.ckpt"))[:2]:
        resumed = run({**plain, "resume": str(checkpoint)})
        for name, weight in saved["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
        done = len(saved["metrics"]) - len(resumed["metrics"])
        assert 0 < done < 3
        for expected, got in zip(saved["metrics"][done:], resumed["metrics"], strict=True):
            names = [name for name in expected if not name.startswith(UNTIMED)]
            assert {n: expected[n] for n in names} == {n: got[n] for n in names}
        assert resumed["samples"] == saved["samples"][done:]
