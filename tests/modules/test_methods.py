"""What the methods without a critic share: how the work is split changes nothing, options act, odd batches work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser
from making import merged
from methods import COARSE, METHODS, method
from ppo_cases import run, write_prompts
from ppo_harness import LastTokenReward, TokenReward, fit, make_module, prompts
from processes import results_of
from torch import Tensor

from rlhf_lightning import modules
from rlhf_lightning.batches import Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rewards import Reward
from rlhf_lightning.rollout.native import NativeEngine

OPTIONS = {
    "iterations": 2,
    "update": {"epochs": 2, "minibatches": 2},
    "optimizer": {"learning_rate": 1e-3, "eps": 1e-3},
}
UNTIMED = ("time/", "rollout/tokens_per_second", "rollout/max_length")
# In the first epoch the policy is its own reference: the margins are rounding, and which side of a pair wins is chance.
TIED = "policy/accuracy"


def trained(policy, name: str, batches=None, reward: Reward | None = None, **options):
    cls, own = method(name)
    reward = LastTokenReward() if reward is None and name in COARSE else reward
    module = make_module(policy, reward, cls, **merged(OPTIONS, own, options))
    fit(module, batches or [prompts(4, start=4 * i) for i in range(module.iterations)])
    return module


def weights(module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in module.state_dict().values() if value.is_floating_point()])


def assert_same_training(one, other) -> None:
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, atol=2e-5, rtol=1e-4, msg=name)


def assert_same_metrics(one, other) -> None:
    for mine, theirs in zip(one, other, strict=True):
        names = [name for name in theirs if not name.startswith(UNTIMED) and name != TIED]
        assert {n: mine[n] for n in names} == {n: pytest.approx(theirs[n], rel=2e-3, abs=1e-5) for n in names}


# ---------------------------------------------------------------- the same work, split otherwise


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_and_padding_do_not_change_the_result(tiny_policy_dir, name):
    plain = trained(tiny_policy_dir, name, update={"micro_batch_tokens": 10_000})
    start = trained(tiny_policy_dir, name, optimizer={"learning_rate": 1e-12})
    assert (weights(plain) - weights(start)).abs().max() > 2e-4  # far more than the tolerance
    padded = [prompts(4, start=4 * i, padding=11) for i in range(2)]
    assert_same_training(trained(tiny_policy_dir, name, padded, update={"micro_batch_tokens": 1}), plain)


@pytest.mark.parametrize("name", METHODS)
def test_filler_rows_do_not_change_the_result(tiny_policy_dir, name):
    options = {"iterations": 1, "update": {"minibatches": 1}}
    plain = trained(tiny_policy_dir, name, [prompts(4)], **options)
    filled = replace(prompts(6), weights=torch.tensor([1.0] * 4 + [0.0] * 2))
    filled = trained(tiny_policy_dir, name, [filled], **options)
    assert_same_training(filled, plain)
    assert_same_metrics(filled.logged, plain.logged)


def case(policy, data, name: str, **trainer) -> dict:
    return {
        "policy": str(policy),
        "data": str(data),
        "batch_size": 5,  # two processes have three prompts and two
        "method": METHODS[name][0],
        "coarse": name in COARSE,
        "options": merged(OPTIONS, METHODS[name][1], {"optimizer": {"learning_rate": 3e-3}}),
        "trainer": trainer,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    write_prompts(path)
    return path


# Every method once, under the strategy whose collectives an uneven share would upset, and the simplest one under DDP.
TWO = [(name, "fsdp2") for name in METHODS] + [("grpo", "ddp"), ("online_dpo", "ddp")]


@pytest.fixture(scope="module")
def two(tiny_policy_dir, data, tmp_path_factory) -> dict:
    cases = {f"{n} {s}": case(tiny_policy_dir, data, n, strategy=s, devices=2) for n, s in TWO}
    return results_of("ppo_cases.py", cases, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("name", "strategy"), TWO)
def test_two_processes_do_what_one_does(tiny_policy_dir, data, two, name, strategy):
    expected, got = run(case(tiny_policy_dir, data, name)), two[f"{name} {strategy}"]
    assert got["samples"] == expected["samples"]
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(got["weights"][key], weight, rtol=1e-3, atol=1e-5, msg=key)
    assert_same_metrics(got["metrics"], expected["metrics"])


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny_policy_dir, data, tmp_path, name):
    plain = case(tiny_policy_dir, data, name)
    saved = run({**plain, "checkpoints": True, "folder": str(tmp_path)})
    resumed = run({**plain, "resume": str(sorted(tmp_path.rglob("batch-*.ckpt"))[0])})
    assert len(resumed["metrics"]) == 1
    assert resumed["samples"] == saved["samples"][1:]
    for key, weight in saved["weights"].items():
        assert torch.equal(resumed["weights"][key], weight), key


# ---------------------------------------------------------------- options

# Another value of each method's own options, and what it is compared with where that is not the method alone.
OTHER = {
    "grpo": {
        "group_size": {"group_size": 2},
        "scale_by_std": {"scale_by_std": False},
        "dynamic_sampling": {"dynamic_sampling": True, "group_size": 2},
        "train_prompts": {"dynamic_sampling": True, "group_size": 2, "train_prompts": 1, "update": {"minibatches": 1}},
        "kl.coef": {"kl": {"coef": 1.0}},
        "kl.loss_coef": {"kl": {"loss_coef": 0.0}},
        "kl.loss_estimator": {"kl": {"loss_estimator": "k2", "loss_coef": 1.0}},
        "objective.normalisation": {"objective": {"normalisation": "token"}},
    },
    "rloo": {"group_size": {"group_size": 2}, "objective.normalisation": {"objective": {"normalisation": "token"}}},
    "reinforce": {
        "group_size": {"group_size": 2},
        "baseline": {"baseline": "group_mean", "group_size": 2},
        "gamma": {"gamma": 0.5},
    },
    "rejection_sampling": {"group_size": {"group_size": 3}, "keep": {"keep": 1}},
    "online_dpo": {
        "group_size": {"group_size": 2},
        "beta": {"beta": 1.0},
        "loss_type": {"loss_type": "ipo"},
        "label_smoothing": {"label_smoothing": 0.3},
    },
}
AGAINST = {
    ("grpo", "dynamic_sampling"): {"group_size": 2},
    ("grpo", "train_prompts"): {"dynamic_sampling": True, "group_size": 2, "update": {"minibatches": 1}},
    ("grpo", "kl.loss_estimator"): {"kl": {"loss_coef": 1.0}},
    ("reinforce", "baseline"): {"group_size": 2},
}


def defaults(cls: type) -> dict[str, object]:
    parser = ArgumentParser()
    parser.add_class_arguments(cls, "it", fail_untyped=False, instantiate=False)
    return {key.removeprefix("it."): value for key, value in parser.get_defaults().items()}


def test_every_own_option_is_in_the_table():
    for name, options in OTHER.items():
        own, ppo = defaults(method(name)[0]), defaults(PPOModule)
        new = {key for key in own if key not in ppo or (own[key] != ppo[key] and not key.startswith("update."))}
        assert set(options) >= new, name
    tested = {METHODS[name][0] for name in OTHER}
    assert tested == {cls for cls, _ in METHODS.values()}


@pytest.fixture(scope="module")
def against(tiny_policy_dir):
    """The weights that a method trains to with the options that another value is compared with; trained once."""
    known: dict[str, Tensor] = {}

    def weights_with(name: str, reward: type[Reward] | None, options: dict) -> Tensor:
        key = repr((name, reward, options))
        if key not in known:
            known[key] = weights(trained(tiny_policy_dir, name, reward=reward and reward(), **options))
        return known[key]

    return weights_with


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, table in OTHER.items() for option in table])
def test_another_value_trains_to_other_weights(tiny_policy_dir, against, name, option):
    reward = LastTokenReward if option in ("dynamic_sampling", "train_prompts") else None
    before = against(name, reward, AGAINST.get((name, option), {}))
    after = trained(tiny_policy_dir, name, reward=reward and reward(), **OTHER[name][option])
    assert not torch.equal(weights(after), before)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("GRPOModule", {"group_size": 1}, "model.group_size: expected at least 2 responses to each prompt, got 1"),
        ("GRPOModule", {"train_prompts": 2}, "model.train_prompts: 2 has no meaning without model.dynamic_sampling"),
        ("GRPOModule", {"dynamic_sampling": True, "train_prompts": 5}, "train_prompts: 5 are more than the 4 prompts"),
        (
            "GRPOModule",
            {"dynamic_sampling": True, "group_size": 2, "train_prompts": 2, "update": {"minibatches": 5}},
            "5 minibatches cannot be made of 4 responses",
        ),
        ("RLOOModule", {"group_size": 1}, "model.group_size"),
        ("ReinforcePlusPlusModule", {"baseline": "group_mean"}, "model.group_size"),
        ("OnlineDPOModule", {"group_size": 1}, "model.group_size"),
        ("OnlineDPOModule", {"loss_type": "ipo", "label_smoothing": 0.1}, "model.label_smoothing"),
        ("RejectionSamplingModule", {"keep": 8}, "model.keep: expected fewer than the 8 responses"),
        ("RejectionSamplingModule", {"update": {"minibatches": 5}}, "5 minibatches cannot be made of 4 responses"),
        ("GRPOModule", {"kl": {"target": 1.0}}, "model.kl.target: adapts kl.coef by factors"),
        ("GRPOModule", {"kl": {"loss_coef": 0.0, "loss_estimator": "k3"}}, "model.kl.loss_estimator: k3 has no effect"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_policy_dir, cls, options, message):
    with pytest.raises(InputError, match=message):
        fit(make_module(tiny_policy_dir, method=getattr(modules, cls), **options), [prompts(4)])


# ---------------------------------------------------------------- batches and metrics


class Same(Reward):
    """Every response is worth the same."""

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.ones(len(rollout))


@pytest.mark.parametrize("name", ["dapo", "online_dpo"])
def test_an_iteration_that_teaches_nothing_makes_no_step(tiny_policy_dir, name):
    module = trained(tiny_policy_dir, name, reward=Same(), optimizer={"learning_rate": 0.1})
    assert module.trainer.global_step == 0
    assert module.iteration == 2
    share = module.logged[0]["rollout/equal_groups" if name == "dapo" else "rollout/ties"]
    assert (share, module.logged[0]["policy/steps"]) == (1.0, 0.0)


@pytest.mark.parametrize("wanted", [2, 7])
def test_the_first_informative_groups_fill_the_minibatches(tiny_policy_dir, wanted):
    """8 prompts are sampled; every minibatch is as large as ``wanted`` prompts make it, or as those that there are."""
    options = {
        "dynamic_sampling": True,
        "group_size": 2,
        "train_prompts": wanted,
        "iterations": 1,
        "update": {"epochs": 1},
    }
    module = trained(tiny_policy_dir, "grpo", [prompts(8)], LastTokenReward(), **options)
    scores = LastTokenReward()(module.rollouts[0]).reshape(8, 2)
    informative = [row for row in range(8) if scores[row, 0] != scores[row, 1]]
    assert 2 < len(informative) < 7  # more than the one case asks for, and fewer than the other
    assert module.logged[0]["rollout/informative_groups"] == len(informative)
    used = informative[:wanted]
    assert sorted(torch.cat(module.stepped_rows).tolist()) == [2 * row + k for row in used for k in range(2)]
    assert [len(rows) for rows in module.stepped_rows] == [len(used)] * 2


def test_groups_are_answered_with_draws_of_their_own(tiny_policy_dir):
    module = trained(tiny_policy_dir, "grpo", iterations=1)
    rollout = module.rollouts[0]
    assert rollout.prompts.rows.tolist() == list(range(16))  # row * group_size + k
    assert rollout.prompts.prompts == [f"prompt {row // 4}" for row in range(16)]
    assert len(set(rollout.responses[:4])) > 1
    assert {name: len(column) for name, column in rollout.prompts.columns.items()} == {}


def test_the_kept_responses_are_the_best(tiny_policy_dir):
    module = trained(tiny_policy_dir, "rejection_sampling", iterations=1)
    scores = TokenReward()(module.rollouts[0]).reshape(4, 4)
    best = scores.sort(dim=1, descending=True).values[:, :2]
    assert module.logged[0]["rollout/kept_scores"] == pytest.approx(best.mean().item())
    assert module.logged[0]["objective/scores"] == pytest.approx(scores.mean().item())


def test_predict_answers_with_the_best_of_n(tiny_policy_dir):
    module = trained(tiny_policy_dir, "rloo", iterations=1, sampling={"best_of": 3})
    batch = prompts(4, start=20)
    everything = module.generate(batch.repeat(3))
    scores = TokenReward()(everything).tolist()
    best = [max(range(3 * row, 3 * row + 3), key=lambda place: scores[place]) for row in range(4)]
    answers = module.predict_step(batch, 0)
    assert [answer["response"] for answer in answers] == [everything.responses[place] for place in best]
    assert [answer["row"] for answer in answers] == batch.rows.tolist()


@pytest.mark.parametrize("name", ["rloo", "rejection_sampling", "online_dpo"])
def test_the_metrics_have_the_names_of_ppos(tiny_policy_dir, name):
    ppo = make_module(tiny_policy_dir)
    fit(ppo, [prompts(4)])
    ours, theirs = set(trained(tiny_policy_dir, name).logged[0]), set(ppo.logged[0])
    of_the_critic = {"critic/grad_norm", "critic/loss", "critic/clipfrac", "critic/explained_variance"}
    of_the_ratio = {"policy/approx_kl", "policy/clipfrac", "policy/ratio", "policy/ratio_var"}
    missing = of_the_critic if name == "rloo" else of_the_critic | of_the_ratio | {"rollout/logprob_gap"}
    assert theirs - ours == missing


@pytest.mark.parametrize("name", ["rejection_sampling", "online_dpo"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_an_exact_engines_log_probs_spare_the_pass_that_only_metrics_need(tiny_policy_dir, monkeypatch, name, top_k):
    """The logged KL is the same; what top-k cut off would make it another, so there the pass is made."""
    calls, forward = [], Policy.forward

    def counting(self, *args, **options):
        calls.append((self, len(args[0])))
        return forward(self, *args, **options)

    options = {
        "iterations": 1,
        "sampling": {"top_k": top_k},
        "update": {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 10**6},
    }
    seen = {}
    for exact in (True, False):
        monkeypatch.setattr(NativeEngine, "exact", exact)
        monkeypatch.setattr(Policy, "forward", counting)
        calls.clear()
        module = trained(tiny_policy_dir, name, [prompts(4)], **options)
        monkeypatch.undo()
        # One in the update; the decode loop tries itself on a single row.
        spared = exact and top_k == 0
        assert sum(policy is module.policy and rows > 1 for policy, rows in calls) == (1 if spared else 2)
        assert ("rollout/logprob_gap" in module.logged[0]) == (not spared)
        seen[exact] = {n: module.logged[0][n] for n in ("objective/kl", "objective/kl_k3", "objective/entropy")}
    assert seen[True] == pytest.approx(seen[False], rel=1e-4, abs=1e-5)
