"""The interface of engines: what a foreign one must return, what is made of it, and when it is given the weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from making import merged
from methods import COARSE, METHODS, method
from ppo_harness import LastTokenReward, fit, make_module, prompts
from rollouts import sample
from torch.utils.data import DataLoader

from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.vocabulary import Vocabulary
from rlhf_lightning.rollout import NativeEngine, Responses, RolloutEngine
from rlhf_lightning.training.objective import Loss

ANYONE = SimpleNamespace(vocabulary=Vocabulary(64))  # a policy that engines of a table do not ask


class Constant(RolloutEngine):
    """Answers from a table: row r gets as many tokens as its number says, at most 3."""

    def __init__(self, **changes):
        self.changes = changes

    def generate(self, policy, prompts, sampling, progress=None):
        lengths = prompts.rows.clamp(max=3)
        tokens = torch.arange(5, 8).expand(len(prompts), 3)
        log_probs = torch.full((len(prompts), 3), -1.0)
        log_probs[torch.arange(3) >= lengths[:, None]] = torch.nan  # what stands past the end is nobody's business
        return Responses(tokens, log_probs, lengths, lengths == 3)._replace(**self.changes)


def test_a_foreign_engine_may_give_nothing():
    rollout = sample(ANYONE, prompts(5), Constant())
    assert rollout.response_lengths.tolist() == [0, 1, 2, 3, 3]
    assert rollout.truncated.tolist() == [False, False, False, True, True]
    assert rollout.log_probs.tolist() == [[0, 0, 0], [-1, 0, 0], [-1, -1, 0], [-1, -1, -1], [-1, -1, -1]]
    assert rollout.responses[0] == ""
    assert rollout.entropy is None
    for row, length in enumerate(rollout.lengths.tolist()):
        start = int(rollout.prompt_lengths[row])
        assert rollout.tokens[row, :start].tolist() == rollout.prompts.tokens[row, :start].tolist()
        assert rollout.tokens[row, start:].tolist() == [5, 6, 7][: length - start] + [0] * (8 - length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(4, 3)}, r"Constant.generate: tokens must be \[5, T\], got \[4, 3\]"),
        ({"log_probs": torch.zeros(5, 2)}, r"log_probs must be \[5, T\], got \[5, 2\]"),
        ({"entropy": torch.zeros(5)}, r"entropy must be \[5, T\], got \[5\]"),
        ({"lengths": torch.zeros(4)}, r"lengths must be \[5\], got \[4\]"),
        ({"truncated": torch.zeros(5, 1)}, r"truncated must be \[5\]"),
        ({"lengths": torch.tensor([0, 0, 4, 0, 0])}, r"lengths must lie between 0 and 3, got \[0, 0, 4, 0, 0\]"),
        ({"lengths": torch.tensor([0, 0, -1, 0, 0])}, "lengths must lie between 0 and 3"),
    ],
)
def test_what_an_engine_returns_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(ANYONE, prompts(5), Constant(**changes))


def test_an_empty_response_trains_like_any_other(tiny_policy_dir):
    """Scored at the last token of its prompt, of no influence on the others' advantages but through whitening."""
    module = make_module(
        tiny_policy_dir, engine=Constant(), kl={"coef": 0.0}, update={"minibatches": 2, "micro_batch_tokens": 16}
    )
    fit(module, [prompts(8)])
    [experience] = module.experiences
    assert experience.mask.sum(dim=1).tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert torch.isfinite(experience.advantages).all()
    assert all(torch.isfinite(torch.tensor(list(logged.values()))).all() for logged in module.logged)
    assert module.logged[-1]["rollout/length"] == pytest.approx(18 / 8)


def test_rollouts_of_nothing_but_empty_responses_are_survived(tiny_policy_dir):
    nothing = Constant(lengths=torch.zeros(4, dtype=torch.int64), truncated=torch.zeros(4, dtype=torch.bool))
    module = make_module(tiny_policy_dir, engine=nothing)
    fit(module, [prompts(4)])
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_empty_responses(tiny_policy_dir, name):
    cls, own = method(name)
    reward = LastTokenReward() if name in COARSE else None
    module = make_module(
        tiny_policy_dir, reward, cls, **merged(own, {"engine": Constant(), "update": {"minibatches": 1}})
    )
    fit(module, [prompts(8)])
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert all(torch.isfinite(torch.tensor(list(logged.values()))).all() for logged in module.logged)


def test_the_entropy_that_is_logged_is_that_of_the_draws(tiny_policy_dir):
    module = make_module(tiny_policy_dir, sampling={"temperature": 0.8})
    fit(module, [prompts(8)])
    [rollout] = module.rollouts
    with torch.no_grad():
        exact = Policy(load_causal_lm(tiny_policy_dir))(rollout.tokens, rollout.lengths, rollout.prompt_lengths, 0.8)
    mean = exact.entropy[rollout.response_mask].mean().item()
    assert module.logged[-1]["rollout/entropy"] == pytest.approx(mean, rel=1e-4)


class Counting(NativeEngine):
    """Notes the optimizer step of each hand-over, and a weight that came with it."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def receive(self, policy):
        self.weights.append(next(policy.parameters()).detach().clone())

    def generate(self, policy, *args, **kwargs):
        assert torch.equal(next(policy.parameters()), self.weights[-1]), "stale weights"
        return super().generate(policy, *args, **kwargs)


def test_an_engine_is_handed_the_weights_once_an_iteration(tiny_policy_dir):
    engine = Counting()
    module = make_module(
        tiny_policy_dir, engine=engine, iterations=3, update={"epochs": 2}, optimizer={"learning_rate": 0.05}
    )
    fit(module)
    assert len(engine.weights) == 3
    assert not torch.equal(engine.weights[0], engine.weights[1])
    module.trainer.validate(module, DataLoader([prompts(4)], batch_size=None), verbose=False)
    assert len(engine.weights) == 4  # a checkpoint might have been loaded


def test_logits_that_are_no_numbers_name_the_last_checkpoint(tiny_policy_dir, tmp_path):
    class Broken(Counting):
        def generate(self, policy, *args, **kwargs):
            if len(self.weights) == 2:
                policy.model.lm_head.weight.data[3] = torch.nan
            return super().generate(policy, *args, **kwargs)

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    module = make_module(tiny_policy_dir, engine=Broken(), iterations=3)
    with pytest.raises(TrainingDiverged, match=r"in iteration 1; the last checkpoint from before is .*\.ckpt"):
        fit(module, enable_checkpointing=True, callbacks=[saves])
    module = make_module(tiny_policy_dir, engine=Broken(), iterations=3)
    with pytest.raises(TrainingDiverged, match="in iteration 1; no checkpoint was saved before"):
        fit(module)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_diverges_names_the_iteration_and_the_last_checkpoint(tiny_policy_dir, tmp_path, what):
    module = make_module(tiny_policy_dir, iterations=3, update={"minibatches": 2})
    losses = module.loss

    def broken(*arguments):
        (loss, *rest), metrics = losses(*arguments)
        if module.trainer.global_step >= 3:
            weight = module.policy.model.lm_head.weight
            zero = torch.sqrt((weight * 0.0).sum())  # with a gradient of 0 / 0
            loss = loss * torch.nan if what == "loss" else loss + zero
        return Loss((loss, *rest), metrics)

    module.loss = broken
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    told = rf"the {what} is NaN or infinite at optimizer step 4 in iteration 1; the last checkpoint from before is "
    with pytest.raises(
        TrainingDiverged, match=told + r".*\.ckpt; resume from it with a lower model.optimizer.learning_rate"
    ):
        fit(module, enable_checkpointing=True, callbacks=[saves])
