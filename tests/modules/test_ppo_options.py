"""Every option of PPO does something: with another value the training ends elsewhere, or the option is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers.modeling_utils
from lightning import Trainer
from making import merged
from ppo_harness import TokenReward, fit, make_module, prompts
from tiny_models import make_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.cli.classes import keys_of
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.rewards import ModelReward
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.totals import Totals

BASE = {
    "iterations": 2,
    "sampling": {"max_new_tokens": 8},
    "kl": {"coef": 0.1},
    "critic": {"kind": "head"},
    "update": {"epochs": 2, "minibatches": 2},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "weight_decay": 0.01},
}
# Another value of each, with what it needs to matter. The base makes responses with and without EOS.
OTHER: dict[str, dict] = {
    "reference": {},  # the fixture's folder is put in
    "critic.kind": {"critic": {"kind": "model"}},
    "critic.learning_rate": {"critic": {"learning_rate": 1e-4}},
    "sampling.max_new_tokens": {"sampling": {"max_new_tokens": 5}},
    "sampling.temperature": {"sampling": {"temperature": 0.7}},
    "sampling.top_k": {"sampling": {"top_k": 5}},
    "sampling.top_p": {"sampling": {"top_p": 0.5}},
    "seed": {"seed": 1},
    "optimizer.learning_rate": {"optimizer": {"learning_rate": 1e-3}},
    "optimizer.weight_decay": {"optimizer": {"weight_decay": 0.5}},
    "optimizer.beta1": {"optimizer": {"beta1": 0.5}},
    "optimizer.beta2": {"optimizer": {"beta2": 0.9}},
    "optimizer.eps": {"optimizer": {"eps": 1e-2}},
    "optimizer.warmup_steps": {"optimizer": {"warmup_steps": 4}},
    "optimizer.schedule": {"optimizer": {"schedule": "cosine"}},
    "iterations": {"iterations": 3},
    "update.epochs": {"update": {"epochs": 3}},
    "update.minibatches": {"update": {"minibatches": 4}},
    "advantages.gamma": {"advantages": {"gamma": 0.8}},
    "advantages.lam": {"advantages": {"lam": 0.5}},
    "advantages.critic_lam": {"advantages": {"critic_lam": 0.5}},
    "advantages.lam_alpha": {"advantages": {"lam_alpha": 0.5}},
    "critic.warmup": {"critic": {"warmup": 1}},
    "objective.importance_cap": {"objective": {"importance_cap": 0.9}},
    "kl.coef": {"kl": {"coef": 1.0}},
    "kl.estimator": {"kl": {"estimator": "k3", "coef": 1.0}},
    "kl.target": {"kl": {"target": 0.01}},
    "kl.horizon": {"kl": {"target": 0.01, "horizon": 50.0}},
    "kl.loss_coef": {"kl": {"loss_coef": 1.0}},
    "kl.loss_estimator": {"kl": {"loss_coef": 1.0, "loss_estimator": "k3"}},
    "kl.stop": {"kl": {"stop": 1e-6}},
    "objective.clip_low": {"objective": {"clip_low": 0.01}},
    "objective.clip_high": {"objective": {"clip_high": 0.01}},
    "objective.dual_clip": {"objective": {"dual_clip": 1.01}},
    "critic.clip": {"critic": {"clip": 0.001}},
    "critic.coef": {"critic": {"coef": 1.0}},
    "objective.entropy_coef": {"objective": {"entropy_coef": 0.1}},
    "objective.normalisation": {"objective": {"normalisation": "sequence"}},
    "advantages.whiten": {"advantages": {"whiten": False}},
    "advantages.whiten_rewards": {"advantages": {"whiten_rewards": True}},
    "scores.clip": {"scores": {"clip": 2.0}},
    "advantages.score_position": {"advantages": {"score_position": "after_eos"}},
    "scores.missing_eos_penalty": {"scores": {"missing_eos_penalty": 2.0}},
    "scores.length_penalty": {"scores": {"length_penalty": 1.0}},
    "scores.length_threshold": {"scores": {"length_penalty": 1.0, "length_threshold": 3}},
    "scores.normalise": {"scores": {"normalise": True}},
    "advantages.bootstrap_truncated": {"advantages": {"bootstrap_truncated": True}},
    "objective.old_log_probs": {"sampling": {"top_k": 5}, "objective": {"old_log_probs": "rollout"}},
    "update.max_grad_norm": {"update": {"max_grad_norm": 0.01}},
    "lora.rank": {"lora": {"rank": 2}},
    "lora.alpha": {"lora": {"rank": 2, "alpha": 8.0}},
    "lora.targets": {"lora": {"rank": 2, "targets": ["q_proj"]}},
}
# What an option is compared with where it matters only beside another one.
AGAINST: dict[str, dict] = {
    "kl.estimator": {"kl": {"coef": 1.0}},
    "kl.horizon": {"kl": {"target": 0.01}},
    "kl.loss_estimator": {"kl": {"loss_coef": 1.0}},
    "objective.old_log_probs": {"sampling": {"top_k": 5}},
    "scores.length_threshold": {"scores": {"length_penalty": 1.0}},
    "lora.alpha": {"lora": {"rank": 2}},
    "lora.targets": {"lora": {"rank": 2}},
}
# Shown elsewhere: model and reward by every test; critic_from below; micro-batches and gradient checkpointing must not
# change the result (test_ppo_truth.py, and below); eval_temperature by checklist item 37; ptx_coef by test_ppo_ptx.py;
# engine by tests/rollout/test_engine.py; best_of by test_methods.py; export_dtype by tests/models/test_try_export.py;
# trust_remote_code is transformers' own;
# compile_layers, which must not change the result either, below.
ELSEWHERE = {
    "model",
    "reward",
    "critic.model",
    "update.micro_batch_tokens",
    "network.gradient_checkpointing",
    "network.compile_layers",
    "sampling.eval_temperature",
    "engine",
    "sampling.best_of",
    "ptx_coef",
    "network.trust_remote_code",
    "network.export_dtype",
}


def trained(policy, **options) -> torch.Tensor:
    module = make_module(policy, TokenReward(), **merged(BASE, options))
    fit(module)
    return torch.cat([value.flatten() for value in module.state_dict().values() if value.is_floating_point()])


@pytest.fixture(scope="module")
def base(tiny_policy_dir):
    return trained(tiny_policy_dir)


def test_every_option_is_in_the_table():
    assert set(keys_of(PPOModule)) == set(OTHER) | ELSEWHERE


@pytest.mark.parametrize("name", OTHER)
def test_another_value_trains_to_other_weights(tiny_policy_dir, base, other_policy_dir, name):
    options = {"reference": str(other_policy_dir)} if name == "reference" else OTHER[name]
    before = trained(tiny_policy_dir, **AGAINST[name]) if name in AGAINST else base
    after = trained(tiny_policy_dir, **options)
    assert after.shape != before.shape or not torch.equal(after, before)


@pytest.fixture(scope="module")
def other_policy_dir(tmp_path_factory, kept_tokenizer):
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(9)
    LlamaForCausalLM(make_config()).save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder


def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny_policy_dir, base, monkeypatch):
    used = []
    original = transformers.modeling_utils.checkpoint

    def counting(*arguments, **options):
        used.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counting)
    torch.testing.assert_close(
        trained(tiny_policy_dir, network={"gradient_checkpointing": True}), base, atol=1e-5, rtol=1e-3
    )
    assert used


@pytest.mark.parametrize("critic", ["model", "head"])
def test_the_critic_starts_from_the_named_reward_model(tiny_policy_dir, tiny_reward_dir, critic):
    module = make_module(
        tiny_policy_dir,
        critic={"kind": critic, "model": str(tiny_reward_dir), "learning_rate": 1e-12},
        optimizer={"learning_rate": 1e-12},
    )
    fit(module)
    started = module.critic.model.score.weight if critic == "model" else module.policy.critic_head.weight
    expected = load_scalar_model(tiny_reward_dir, fresh_head=False).score.weight
    torch.testing.assert_close(started, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": {"dual_clip": 0.9}}, "model.objective.dual_clip: expected a number above 1, got 0.9"),
        ({"sampling": {"top_p": 1.5}}, "model.sampling.top_p"),
        ({"kl": {"horizon": 10000.0}}, "model.kl.horizon: 10000.0 has no effect without kl.target"),
        ({"kl": {"loss_estimator": "k2"}}, "model.kl.loss_estimator: k2 has no effect without a weight"),
        (
            {"advantages": {"lam": 0.95, "critic_lam": 1.0, "lam_alpha": 0.05}},
            "model.advantages.lam: 0.95 has no effect beside critic_lam",
        ),
        ({"kl": {"target": 1.0, "coef": 0.0}}, "model.kl.target: adapts kl.coef by factors"),
        (
            {"critic": {"warmup": 1}},
            "model.critic.warmup: after 1 iterations of the critic alone none of the 1 are left",
        ),
        (
            {"objective": {"importance_cap": 2.0, "old_log_probs": "rollout"}},
            "model.objective.importance_cap: 2.0 has no effect with old_log",
        ),
        (
            {"scores": {"missing_eos_penalty": 1.0}, "advantages": {"bootstrap_truncated": True}},
            "model.scores.missing_eos_penalty: 1.0 has no effect on a cut response with advantages.bootstrap_truncated",
        ),
        (
            {"scores": {"length_penalty": 0.5}, "advantages": {"bootstrap_truncated": True}},
            "model.scores.length_penalty: 0.5 has no effect on a cut",
        ),
        (
            {"network": {"compile_layers": True, "gradient_checkpointing": True}},
            "model.network.compile_layers: layers that are",
        ),
        ({"scores": {"length_threshold": 3}}, "model.scores.length_threshold: 3 has no effect without a penalty"),
        ({"scores": {"length_threshold": 6, "length_penalty": 0.1}}, "no response is longer than max_new_tokens 6"),
        ({"update": {"minibatches": 9}}, "model.update.minibatches: 9 minibatches cannot be made of 8 responses"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_policy_dir, options, message):
    with pytest.raises(InputError, match=message):
        fit(make_module(tiny_policy_dir, **options))


def test_no_reward_is_an_error_that_says_what_to_do(tiny_policy_dir):
    module = PPOModule(str(tiny_policy_dir), iterations=1, update=UpdateOptions(minibatches=1))
    with pytest.raises(InputError, match=r"model\.reward: none is given"):
        fit(module, [prompts()])


def test_compiled_layers_train_to_the_same_weights(tiny_policy_dir):
    found = []
    for compiled in (False, True):
        module = make_module(
            tiny_policy_dir,
            iterations=2,
            critic={"kind": "model", "warmup": 1},
            update={"minibatches": 2},
            optimizer={"eps": 1e-3},
            network={"compile_layers": compiled},
        )
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        fit(module)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > before) == compiled
        found.append(module.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_reference_of_another_vocabulary_is_refused(tiny_policy_dir, tmp_path, pad_is_eos_tokenizer):
    shutil.copytree(tiny_policy_dir, tmp_path / "other")
    pad_is_eos_tokenizer.add_tokens(["zebra"])
    pad_is_eos_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"model\.reference: .* has another vocabulary"):
        fit(make_module(tiny_policy_dir, reference=str(tmp_path / "other")))


def test_narrow_sampling_is_warned_about(tiny_policy_dir):
    with pytest.warns(UserWarning, match="rollout/logprob_gap"):
        fit(make_module(tiny_policy_dir, sampling={"top_k": 2}))


def test_sequences_longer_than_the_model_has_positions_are_refused_before_training(tiny_policy_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "' + "cat " * 100 + '"}\n')
    data = PreferenceDataModule(str(tmp_path / "rows.jsonl"), batch_size=1, validation_fraction=0.0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(InputError, match="may take 129 tokens and the model has positions for 128"):
        trainer.fit(make_module(tiny_policy_dir, sampling={"max_new_tokens": 29}), datamodule=data)


def test_a_head_starts_fresh_beside_a_reward_model_of_another_width(tiny_policy_dir, tiny_tokenizer, tmp_path):
    wide = make_config(num_labels=1, hidden_size=64, num_attention_heads=4)
    LlamaForSequenceClassification(wide).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    fit(make_module(tiny_policy_dir, ModelReward(str(tmp_path)), critic={"kind": "head"}))
    with pytest.raises(InputError, match="head"):
        fit(make_module(tiny_policy_dir, critic={"kind": "head", "model": str(tmp_path)}))


def test_the_models_are_built_on_the_cpu_whatever_the_default_device(tiny_policy_dir):
    """Lightning builds under the training device; ``meta`` stands in for it: what is built there has no numbers."""
    with torch.device("meta"):
        policy = load_causal_lm(tiny_policy_dir)
        scalar = load_scalar_model(tiny_policy_dir, fresh_head=True)
    assert {p.device.type for model in (policy, scalar) for p in model.parameters()} == {"cpu"}


def test_sums_made_on_several_devices_come_together():
    with FakeTensorMode():
        totals = Totals()
        totals.add("a", torch.ones(3, device="cuda"))
        totals.add("b", torch.tensor(1.0))
        stacked = [sums.device.type for sums in totals._sums.values()]
        assert stacked == ["cuda", "cpu"]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            totals.means()  # it comes as far as reading the numbers, which a fake tensor has none of
