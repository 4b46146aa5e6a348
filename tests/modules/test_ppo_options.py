"""Every option of PPO does something: with another value the training ends elsewhere, or the option is refused."""

from __future__ import annotations

import inspect
import shutil

import pytest
import torch
import transformers.modeling_utils
from lightning import Trainer
from ppo_harness import TokenReward, fit, make_module, prompts
from tiny_models import make_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.modules.actor_critic import ActorCriticModule
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.modules.optimisation import OptimisedModule
from rlhf_lightning.modules.policy_gradient import PolicyGradientModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.sampling import SamplingModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards import ModelReward

BASE = {
    "iterations": 2,
    "epochs": 2,
    "minibatches": 2,
    "max_new_tokens": 8,
    "learning_rate": 3e-3,
    "kl_coef": 0.1,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "critic": "head",
}
# Another value of each, with what it needs to matter. The base makes responses with and without EOS.
OTHER: dict[str, dict] = {
    "reference": {},  # the fixture's folder is put in
    "critic": {"critic": 1},
    "critic_learning_rate": {"critic_learning_rate": 1e-4},
    "max_new_tokens": {"max_new_tokens": 5},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.5},
    "seed": {"seed": 1},
    "learning_rate": {"learning_rate": 1e-3},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.9},
    "adam_eps": {"adam_eps": 1e-2},
    "warmup_steps": {"warmup_steps": 4},
    "schedule": {"schedule": "cosine"},
    "iterations": {"iterations": 3},
    "epochs": {"epochs": 3},
    "minibatches": {"minibatches": 4},
    "gamma": {"gamma": 0.8},
    "lam": {"lam": 0.5},
    "critic_lam": {"critic_lam": 0.5},
    "lam_alpha": {"lam_alpha": 0.5},
    "critic_warmup": {"critic_warmup": 1},
    "importance_cap": {"importance_cap": 0.9},
    "kl_coef": {"kl_coef": 1.0},
    "kl_estimator": {"kl_estimator": "k3", "kl_coef": 1.0},
    "kl_target": {"kl_target": 0.01},
    "kl_horizon": {"kl_target": 0.01, "kl_horizon": 50.0},
    "kl_loss_coef": {"kl_loss_coef": 1.0},
    "kl_loss_estimator": {"kl_loss_coef": 1.0, "kl_loss_estimator": "k3"},
    "kl_stop": {"kl_stop": 1e-6},
    "clip_low": {"clip_low": 0.01},
    "clip_high": {"clip_high": 0.01},
    "dual_clip": {"dual_clip": 1.01},
    "clip_value": {"clip_value": 0.001},
    "value_coef": {"value_coef": 1.0},
    "entropy_coef": {"entropy_coef": 0.1},
    "loss_normalisation": {"loss_normalisation": "sequence"},
    "whiten_advantages": {"whiten_advantages": False},
    "whiten_rewards": {"whiten_rewards": True},
    "score_clip": {"score_clip": 2.0},
    "score_position": {"score_position": "after_eos"},
    "missing_eos_penalty": {"missing_eos_penalty": 2.0},
    "length_penalty": {"length_penalty": 1.0},
    "length_threshold": {"length_penalty": 1.0, "length_threshold": 3},
    "normalise_scores": {"normalise_scores": True},
    "bootstrap_truncated": {"bootstrap_truncated": True},
    "old_log_probs": {"old_log_probs": "rollout", "top_k": 5},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "lora_rank": {"lora_rank": 2},
    "lora_alpha": {"lora_rank": 2, "lora_alpha": 8.0},
    "lora_targets": {"lora_rank": 2, "lora_targets": ["q_proj"]},
}
# What an option is compared with where it matters only beside another one.
AGAINST: dict[str, dict] = {
    "kl_estimator": {"kl_coef": 1.0},
    "kl_horizon": {"kl_target": 0.01},
    "kl_loss_estimator": {"kl_loss_coef": 1.0},
    "old_log_probs": {"top_k": 5},
    "length_threshold": {"length_penalty": 1.0},
    "lora_alpha": {"lora_rank": 2},
    "lora_targets": {"lora_rank": 2},
}
# Shown elsewhere: model and reward by every test; critic_from below; micro-batches and gradient checkpointing must not
# change the result (test_ppo_truth.py, and below); eval_temperature by checklist item 37; ptx_coef by test_ppo_ptx.py;
# engine by tests/rollout/test_engine.py; best_of by test_methods.py; export_dtype by tests/models/test_try_export.py;
# trust_remote_code is transformers' own;
# compile_layers, which must not change the result either, below.
ELSEWHERE = {
    "model",
    "reward",
    "critic_from",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "compile_layers",
    "eval_temperature",
    "engine",
    "best_of",
    "ptx_coef",
    "trust_remote_code",
    "export_dtype",
}


def trained(policy, **options) -> torch.Tensor:
    module = make_module(policy, TokenReward(), **{**BASE, **options})
    fit(module)
    return torch.cat([value.flatten() for value in module.state_dict().values() if value.is_floating_point()])


@pytest.fixture(scope="module")
def base(tiny_policy_dir):
    return trained(tiny_policy_dir)


def test_every_option_is_in_the_table():
    names = set()
    own = (PPOModule, ActorCriticModule, PolicyGradientModule, OnPolicyModule, SamplingModule)
    for owner in (*own, RLHFModule, OptimisedModule):
        names |= set(inspect.signature(owner.__init__).parameters) - {"self", "kwargs"}
    assert names == set(OTHER) | ELSEWHERE


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
    torch.testing.assert_close(trained(tiny_policy_dir, gradient_checkpointing=True), base, atol=1e-5, rtol=1e-3)
    assert used


@pytest.mark.parametrize("critic", ["model", "head"])
def test_the_critic_starts_from_the_named_reward_model(tiny_policy_dir, tiny_reward_dir, critic):
    module = make_module(
        tiny_policy_dir,
        critic=critic,
        critic_from=str(tiny_reward_dir),
        learning_rate=1e-12,
        critic_learning_rate=1e-12,
    )
    fit(module)
    started = module.critic.model.score.weight if critic == "model" else module.policy.critic_head.weight
    expected = load_scalar_model(tiny_reward_dir, fresh_head=False).score.weight
    torch.testing.assert_close(started, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 0.9}, "model.dual_clip: expected a number above 1, got 0.9"),
        ({"top_p": 1.5}, "model.top_p"),
        ({"kl_horizon": 10000.0}, "model.kl_horizon: 10000.0 has no effect without kl_target"),
        ({"kl_loss_estimator": "k2"}, "model.kl_loss_estimator: k2 has no effect without a weight"),
        ({"lam": 0.95, "critic_lam": 1.0, "lam_alpha": 0.05}, "model.lam: 0.95 has no effect beside critic_lam"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "model.kl_target: adapts kl_coef by factors"),
        ({"critic_warmup": 1}, "model.critic_warmup: after 1 iterations of the critic alone none of the 1 are left"),
        ({"importance_cap": 2.0, "old_log_probs": "rollout"}, "model.importance_cap: 2.0 has no effect with old_log"),
        (
            {"bootstrap_truncated": True, "missing_eos_penalty": 1.0},
            "model.missing_eos_penalty: 1.0 has no effect on a cut response with bootstrap_truncated",
        ),
        ({"bootstrap_truncated": True, "length_penalty": 0.5}, "model.length_penalty: 0.5 has no effect on a cut"),
        (
            {"compile_layers": True, "gradient_checkpointing": True},
            "model.compile_layers: layers that are",
        ),
        ({"length_threshold": 3}, "model.length_threshold: 3 has no effect without a penalty"),
        ({"length_threshold": 6, "length_penalty": 0.1}, "no response is longer than max_new_tokens 6"),
        ({"minibatches": 9}, "model.minibatches: 9 minibatches cannot be made of 8 responses"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny_policy_dir, options, message):
    with pytest.raises(InputError, match=message):
        fit(make_module(tiny_policy_dir, **options))


def test_no_reward_is_an_error_that_says_what_to_do(tiny_policy_dir):
    module = PPOModule(str(tiny_policy_dir), iterations=1, minibatches=1)
    with pytest.raises(InputError, match=r"model\.reward: none is given"):
        fit(module, [prompts()])


def test_compiled_layers_train_to_the_same_weights(tiny_policy_dir):
    found = []
    for compiled in (False, True):
        module = make_module(
            tiny_policy_dir,
            compile_layers=compiled,
            critic="model",
            critic_warmup=1,
            iterations=2,
            minibatches=2,
            adam_eps=1e-3,
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
    with pytest.raises(InputError, match=r"model\.reference: the vocabulary"):
        fit(make_module(tiny_policy_dir, reference=str(tmp_path / "other")))


def test_narrow_sampling_is_warned_about(tiny_policy_dir):
    with pytest.warns(UserWarning, match="rollout/logprob_gap"):
        fit(make_module(tiny_policy_dir, top_k=2))


def test_sequences_longer_than_the_model_has_positions_are_refused_before_training(tiny_policy_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "' + "cat " * 100 + '"}\n')
    data = PreferenceDataModule(str(tmp_path / "rows.jsonl"), batch_size=1, validation_fraction=0.0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(InputError, match="may take 129 tokens and the model has positions for 128"):
        trainer.fit(make_module(tiny_policy_dir, max_new_tokens=29), datamodule=data)


def test_a_head_starts_fresh_beside_a_reward_model_of_another_width(tiny_policy_dir, tiny_tokenizer, tmp_path):
    wide = make_config(num_labels=1, hidden_size=64, num_attention_heads=4)
    LlamaForSequenceClassification(wide).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    fit(make_module(tiny_policy_dir, ModelReward(str(tmp_path)), critic="head"))
    with pytest.raises(InputError, match="head"):
        fit(make_module(tiny_policy_dir, critic="head", critic_from=str(tmp_path)))


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
