"""Shaping of scores against the papers' formulas, and the running normalisation over iterations and a resume."""

import statistics
from dataclasses import replace

import pytest
import torch
from ppo_cases import run, write_prompts
from ppo_harness import fit, make_module
from test_rewards import make_rollout

from rlhf_lightning.training.shaping import ScoreOptions, ScoreShaping


def rollout_of(lengths, truncated):
    rollout = make_rollout(["x"] * len(lengths))
    return replace(rollout, lengths=rollout.prompt_lengths + torch.tensor(lengths), truncated=torch.tensor(truncated))


def soft_overlong_punishment(length, most, cache):
    """DAPO, Yu et al. 2025, arXiv 2503.14476, equation 13."""
    if length <= most - cache:
        return 0.0
    if length <= most:
        return ((most - cache) - length) / cache
    return -1.0


def test_the_length_penalty_is_dapos_soft_overlong_punishment():
    lengths, most, cache = list(range(21)), 20, 8
    shaping = ScoreShaping(ScoreOptions(length_penalty=1 / cache, length_threshold=most - cache), 20)
    shaped = shaping(torch.zeros(21), rollout_of(lengths, [False] * 21))
    torch.testing.assert_close(shaped, torch.tensor([soft_overlong_punishment(n, most, cache) for n in lengths]))


def test_the_order_is_normalise_penalise_clip():
    options = ScoreOptions(normalise=True, missing_eos_penalty=0.5, length_penalty=0.1, length_threshold=2, clip=1.0)
    shaping = ScoreShaping(options, 20)
    scores, lengths, truncated = [1.0, 2.0, 6.0], [2, 5, 1], [False, True, False]
    shaping.observe(torch.tensor([*scores, 100.0]), torch.tensor([True, True, True, False]))
    mean, deviation = statistics.mean(scores), statistics.pstdev(scores)
    expected = [
        (score - mean) / deviation - 0.5 * cut - 0.1 * max(0, length - 2)
        for score, length, cut in zip(scores, lengths, truncated, strict=True)
    ]
    expected = [min(1.0, max(-1.0, value)) for value in expected]
    shaped = shaping(torch.tensor(scores), rollout_of(lengths, truncated))
    torch.testing.assert_close(shaped, torch.tensor(expected))


def test_normalisation_runs_over_all_iterations(tiny_policy_dir):
    module = make_module(tiny_policy_dir, iterations=3, scores={"normalise": True}, kl={"coef": 0.0})
    fit(module)
    seen = []
    for rollout, experience in zip(module.rollouts, module.experiences, strict=True):
        scores = module.reward(rollout).double().tolist()
        seen += scores
        mean, deviation = statistics.mean(seen), statistics.pstdev(seen)
        # gamma 1 and no KL: the return of the first state under lambda 1 is the shaped score; here by the returns' sum
        steps = rollout.response_lengths
        expected = torch.tensor([(score - mean) / deviation for score in scores])
        last = experience.returns.gather(1, (steps - 1)[:, None])[:, 0]  # the last step's return is its reward alone
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)


def test_normalisation_goes_on_exactly_after_a_resume(tiny_policy_dir, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    options = {"iterations": 3, "scores": {"normalise": True}, "update": {"minibatches": 2}}
    case = {"policy": str(tiny_policy_dir), "data": str(tmp_path / "prompts.jsonl"), "batch_size": 5}
    case |= {"options": options, "trainer": {}, "checkpoints": True, "folder": str(tmp_path / "whole")}
    whole = run(case)
    first = min((tmp_path / "whole").rglob("batch-*.ckpt"))
    assert torch.load(first, weights_only=True)["on_policy"]["scores"]["count"] == 5.0
    resumed = run({**case, "checkpoints": False, "resume": str(first)})
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in whole["weights"].items())


@pytest.mark.parametrize("clip", [None, 2.0])
def test_without_options_scores_are_only_clipped(clip):
    shaped = ScoreShaping(ScoreOptions(clip=clip), 20)(torch.tensor([-3.0, 1.0]), rollout_of([3, 4], [True, False]))
    assert shaped.tolist() == ([-3.0, 1.0] if clip is None else [-2.0, 1.0])
