"""Uneven work: responses that the reward skips, responses without a token, minibatches without anything to learn."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from making import make, merged
from methods import METHODS, method
from ppo_cases import run, write_prompts
from ppo_harness import Recorder, TokenReward, fit, make_module, prompts
from processes import results_of
from torch.utils.data import DataLoader

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.ppo import PPOModule

OPTIONS = {
    "iterations": 2,
    "kl": {"target": 1.0},
    "critic": {"kind": "head"},
    "update": {"epochs": 2, "minibatches": 3},
    "optimizer": {"learning_rate": 3e-3},
}


class Skipping(TokenReward):
    """No score for the prompts of the given rows."""

    may_skip = True

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, rollout):
        return super().forward(rollout).masked_fill(torch.isin(rollout.prompts.rows, self.rows), math.nan)


def only(batch, rows):
    """The batch with these of its rows alone."""
    kept = torch.tensor(rows)
    names = ("tokens", "lengths", "rows", "weights")
    return replace(
        batch, prompts=[batch.prompts[row] for row in rows], **{name: getattr(batch, name)[kept] for name in names}
    )


def weights_of(module: PPOModule) -> torch.Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values() if value.is_floating_point()])


def test_skipped_responses_train_as_if_they_were_not_there(tiny_policy_dir):
    skipping = make_module(tiny_policy_dir, Skipping(1, 4, 5, 9), **OPTIONS)
    fit(skipping)
    without = make_module(tiny_policy_dir, **OPTIONS)
    fit(without, [only(prompts(), [0, 2, 3, 6, 7]), only(prompts(start=8), [0, 2, 3, 4, 5, 6, 7])])
    torch.testing.assert_close(weights_of(skipping), weights_of(without), atol=1e-6, rtol=1e-4)
    for got, expected, skipped in zip(skipping.logged, without.logged, (3, 1), strict=True):
        assert got["reward/skipped"] == skipped
        for name in ("objective/scores", "objective/scores_std", "rollout/length", "policy/steps", "objective/kl"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4), name


def test_an_iteration_without_any_response_left_makes_no_step_and_says_so(tiny_policy_dir):
    module = make_module(tiny_policy_dir, Skipping(*range(8, 16)), **{**OPTIONS, "iterations": 3})
    after = []
    module.on_train_batch_end = lambda *_: after.append(weights_of(module).clone())
    with pytest.warns(UserWarning, match="iteration 1: the reward left no response to learn from; no step was made"):
        fit(module)
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[1], after[2])
    assert module.logged[1]["policy/steps"] == 0
    assert module.logged[1]["reward/skipped"] == 8
    assert not any(math.isnan(value) for value in module.logged[1].values())
    assert math.isfinite(module.kl.coef)


def test_a_run_that_learnt_nothing_is_told_at_its_end(tiny_policy_dir):
    options = {**OPTIONS, "iterations": 1}
    with pytest.warns(UserWarning, match="no step was made in this run: the model is the one that it began with"):
        fit(make_module(tiny_policy_dir, Skipping(*range(8)), **options))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no step was made in this run")
        fit(make_module(tiny_policy_dir, **options))


def test_fewer_responses_than_minibatches_make_fewer_steps(tiny_policy_dir):
    module = make_module(tiny_policy_dir, Skipping(*range(2, 8)), **{**OPTIONS, "iterations": 1})
    fit(module)
    assert module.logged[0]["policy/steps"] == 2 * 2


def test_skipped_held_out_responses_are_counted_over_all_batches(tiny_policy_dir):
    module = make_module(tiny_policy_dir, Skipping(0, 2, 5), **{**OPTIONS, "iterations": 1})
    fit(module)
    batches = DataLoader([prompts(4), prompts(3, start=4), prompts(2, start=7)], batch_size=None)
    (logged,) = module.trainer.validate(module, batches, verbose=False)
    assert logged["val/skipped"] == 3
    module.reward.may_skip, module.reward.rows = False, torch.tensor([])
    (logged,) = module.trainer.validate(module, batches, verbose=False)
    assert "val/skipped" not in logged


def test_nan_from_a_reward_that_may_not_skip_is_an_error(tiny_policy_dir):
    reward = Skipping(3)
    reward.may_skip = False
    with pytest.raises(InputError, match="the score of response 3 is nan"):
        fit(make_module(tiny_policy_dir, reward, **OPTIONS))


class Silent(Recorder):
    """An engine that gives no token for some rows."""

    silent: tuple[int, ...] = ()

    def generate(self, prompts, iteration=0, **overrides):
        rollout = super().generate(prompts, iteration, **overrides)
        mute = torch.isin(prompts.rows, torch.tensor(self.silent))
        lengths = torch.where(mute, rollout.prompt_lengths, rollout.lengths)
        width = int((lengths - rollout.prompt_lengths).max())
        log_probs, entropy = (
            x.masked_fill(mute[:, None], 0.0)[:, :width] for x in (rollout.log_probs, rollout.entropy)
        )
        return replace(
            rollout,
            tokens=rollout.tokens[:, : int(lengths.max())],
            lengths=lengths,
            log_probs=log_probs,
            entropy=entropy,
            truncated=rollout.truncated | mute,
        )


SMALL = {"sampling": {"max_new_tokens": 6}, "update": {"micro_batch_tokens": 64}}


def silent(policy, rows, **options):
    module = make(Silent, str(policy), TokenReward(), **merged(SMALL, OPTIONS, options))
    module.silent = tuple(rows)
    return module


@pytest.mark.parametrize("critic", ["model", "head"])
def test_a_response_without_a_token_teaches_nothing(tiny_policy_dir, critic):
    options = {
        "iterations": 1,
        "kl": {"target": None},
        "critic": {"kind": critic},
        "advantages": {"bootstrap_truncated": True},
        "update": {"minibatches": 1},
    }
    module = silent(tiny_policy_dir, [1, 6], **options)
    fit(module)
    without = silent(tiny_policy_dir, [], **options)
    fit(without, [only(prompts(), [0, 2, 3, 4, 5, 7])])
    torch.testing.assert_close(weights_of(module), weights_of(without), atol=1e-6, rtol=1e-4)
    assert module.logged[0]["rollout/length"] == pytest.approx(without.logged[0]["rollout/length"] * 6 / 8)


def test_a_minibatch_without_a_token_makes_no_step(tiny_policy_dir):
    module = silent(tiny_policy_dir, [2, 5], iterations=1, update={"minibatches": 8, "epochs": 1})
    fit(module)
    assert module.logged[0]["policy/steps"] == 6


def test_an_iteration_without_any_token_changes_nothing(tiny_policy_dir):
    module = silent(tiny_policy_dir, range(8, 16))
    after = []
    module.on_train_batch_end = lambda *_: after.append(weights_of(module).clone())
    fit(module)
    assert torch.equal(after[0], after[1])
    assert module.logged[1]["policy/steps"] == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_of_which_one_has_nothing_left_learn_what_one_does(tiny_policy_dir, tmp_path, strategy):
    write_prompts(tmp_path / "prompts.jsonl", rows=5)
    # The prompts of odd rows, all of which lie with the second process.
    (tmp_path / "mine.py").write_text(
        "def even(prompts, responses):\n"
        "    words = [len(prompt.split()) for prompt in prompts]\n"
        "    return [len(r) / (0 if w % 2 == 0 else 1) for r, w in zip(responses, words)]\n"
    )
    case = {"policy": str(tiny_policy_dir), "data": str(tmp_path / "prompts.jsonl"), "batch_size": 5}
    case |= {
        "function": f"{tmp_path / 'mine.py'}:even",
        "options": merged(OPTIONS, {"update": {"minibatches": 2}, "optimizer": {"eps": 1e-3}}),
    }
    one = run({**case, "trainer": {}})
    two = results_of("ppo_cases.py", {"a": {**case, "trainer": {"strategy": strategy, "devices": 2}}}, tmp_path)["a"]
    assert one["metrics"][0]["reward/skipped"] == two["metrics"][0]["reward/skipped"] == 2
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_group_with_a_skipped_response_is_left_out_whole(tiny_policy_dir, name):
    cls, own = method(name)
    options = merged(own, {"update": {"epochs": 2, "minibatches": 2}})
    group = own.get("group_size", 1)
    skipping = make_module(tiny_policy_dir, Skipping(2 * group + group - 1), cls, **options)
    fit(skipping, [prompts(5)])
    without = make_module(tiny_policy_dir, None, cls, **options)
    fit(without, [only(prompts(5), [0, 1, 3, 4])])
    torch.testing.assert_close(weights_of(skipping), weights_of(without), atol=1e-6, rtol=1e-4)
    assert skipping.logged[0]["reward/skipped"] == group


def test_the_best_of_several_is_never_a_skipped_one(tiny_policy_dir):
    module = make_module(tiny_policy_dir, sampling={"best_of": 3})
    fit(module)
    module.reward.forward = Skipping(0, 2, 3, 5).forward  # of rows 0 to 5, three to each of two prompts
    module.reward.may_skip = True
    everything = module.generate(prompts(2).repeat(3)).responses
    assert module.answer(prompts(2)).responses == [everything[1], everything[4]]
