"""Training adapters: what moves, what is held, what a checkpoint has, the reference without weights of its own."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from making import make, merged
from ppo_harness import fit, make_module, prompts
from small_data import SmallData, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.callbacks.checkpoint_files import latest
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.lora import adapted_layers
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rewards import ModelReward

LORA = {"optimizer": {"learning_rate": 0.02}, "lora": {"rank": 2}}
BATCHES = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


def weights_at_the_start(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def check_moved(module: Any, start: dict[str, Tensor], head: str | None = None) -> None:
    """The loaded weights are as they were; every B and the head that is trained beside it have moved."""
    trained = module.model
    state = {name.replace(".base_layer.", "."): value for name, value in trained.model.state_dict().items()}
    for name, value in start.items():
        if name in state:
            assert torch.equal(state[name], value), name
    moved = [p for name, p in trained.named_parameters() if ".lora_B." in name]
    assert len(moved) == 14 and all(bool((p != 0).any()) for p in moved)
    names = {name for name, p in trained.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert names == ({head} if head else set())


def test_sft_moves_the_adapter_alone(tiny_policy_dir: Path) -> None:
    module = make(SFTModule, str(tiny_policy_dir), **LORA)
    train(module, SmallData(tiny_policy_dir, BATCHES))
    check_moved(module, weights_at_the_start(tiny_policy_dir))
    assert all(layer.scaling == {"default": 2.0} for layer in adapted_layers(module.policy).values())


def test_a_reward_model_moves_its_adapter_and_head(tiny_policy_dir: Path) -> None:
    module = make(RewardModelModule, str(tiny_policy_dir), **merged(LORA, {"lora": {"alpha": 8.0}}))
    train(module, SmallData(tiny_policy_dir, BATCHES))
    check_moved(module, weights_at_the_start(tiny_policy_dir), "model.score.weight")
    assert all(layer.scaling == {"default": 4.0} for layer in adapted_layers(module.reward_model).values())


def test_dpo_with_the_adapter_switched_off_is_dpo_with_a_frozen_copy(tiny_policy_dir: Path) -> None:
    trained, metrics = [], []
    for reference in (None, str(tiny_policy_dir)):
        module = make(DPOModule, str(tiny_policy_dir), reference=reference, beta=0.5, **LORA)
        trained.append(train(module, SmallData(tiny_policy_dir, BATCHES, held_out=True)))
        logged = module.trainer.callback_metrics
        metrics.append({name: float(value) for name, value in logged.items() if "per_second" not in name})
        check_moved(module, weights_at_the_start(tiny_policy_dir))
    assert metrics[0] == metrics[1] and metrics[0]["val/margin"] != 0.0
    assert all(torch.equal(trained[1][name], value) for name, value in trained[0].items())


@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_with_the_adapter_switched_off_is_ppo_with_a_frozen_copy(
    critic: object, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    runs = []
    for reference in (None, str(tiny_policy_dir)):
        options = {
            "iterations": 2,
            "reference": reference,
            **LORA,
            "critic": {"kind": critic},
            "update": {"minibatches": 2},
        }
        module = make_module(tiny_policy_dir, ModelReward(str(tiny_reward_dir)), **options)
        fit(module)
        runs.append(module)
    first, second = runs
    for name in ("objective/kl", "objective/entropy", "policy/approx_kl", "policy/grad_norm"):
        assert [m[name] for m in first.logged] == [m[name] for m in second.logged], name
    assert first.logged[1]["objective/kl"] != 0.0
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    frozen = Policy(load_causal_lm(tiny_policy_dir))
    rollout = first.rollouts[-1]
    with torch.no_grad():
        inputs = rollout.tokens, rollout.lengths, rollout.prompt_lengths
        assert torch.equal(first.reference(*inputs).log_probs, frozen(*inputs).log_probs)
    trained = {name for name, p in first.named_parameters() if p.requires_grad and ".lora_" not in name}
    heads = (
        {"actors.critic.model.score.weight"}
        if critic == "model"
        else {f"actors.policy.critic_head.{x}" for x in ("weight", "bias")}
    )
    assert trained == heads


def parameters_alive() -> int:
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if type(x) is nn.Parameter)


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_no_second_copy_of_the_weights_is_held(kind: str, tiny_policy_dir: Path) -> None:
    size = sum(p.numel() for p in load_causal_lm(tiny_policy_dir).parameters())
    before = parameters_alive()
    if kind == "dpo":
        module = make(DPOModule, str(tiny_policy_dir), **LORA)
        train(module, SmallData(tiny_policy_dir, BATCHES[:1]))
    else:
        module = make_module(tiny_policy_dir, critic={"kind": "head"}, **LORA)
        fit(module)
    held = parameters_alive() - before
    own = sum(p.numel() for p in module.parameters())
    assert size < own < 1.2 * size
    assert held == own
    moments = module.trainer.optimizers[0].state_dict()["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )


def fit_saved(
    folder: Path, run: Path, steps: int, resume: Path | None = None, strategy: str = "auto", **options: Any
) -> DPOModule:
    module = make(DPOModule, str(folder), beta=0.5, **merged(LORA, options))
    callbacks = [RunCheckpoint(every_n_batches=1, keep=9)]
    data = SmallData(folder, BATCHES * 2)
    settings = {"default_root_dir": run, "callbacks": callbacks, "enable_checkpointing": True, "max_steps": steps}
    settings["strategy"] = strategy
    train(module, data, ckpt_path=None if resume is None else str(resume), **settings)
    return module


def test_a_checkpoint_holds_what_is_trained_and_resumes_bit_for_bit(tiny_policy_dir: Path, tmp_path: Path) -> None:
    straight = fit_saved(tiny_policy_dir, tmp_path / "straight", 5)
    fit_saved(tiny_policy_dir, tmp_path / "broken", 2)
    checkpoint = latest(tmp_path / "broken" / "checkpoints")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert saved.keys() == {name for name, p in straight.named_parameters() if p.requires_grad}
    resumed = fit_saved(tiny_policy_dir, tmp_path / "broken", 5, checkpoint)
    for (name, got), expected in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(got, expected), name
    with pytest.raises(InputError, match=r"the checkpoint does not fit the model \(policy.*lora.targets"):
        fit_saved(tiny_policy_dir, tmp_path / "other", 5, checkpoint, lora={"targets": ["q_proj"]})


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_adapters_resume_beside_the_weights_that_they_were_trained_with(
    strategy: str, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    base, moved, run = tmp_path / "base", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(tiny_policy_dir, base)
    try:
        fit_saved(base, run, 1, strategy=strategy)
        checkpoint = latest(run / "checkpoints")
        shutil.copytree(base, moved)  # the same weights, wherever they are
        fit_saved(moved, tmp_path / "again", 2, checkpoint, strategy=strategy)
        model = AutoModelForCausalLM.from_pretrained(moved)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
        model.save_pretrained(moved)
        with pytest.raises(InputError, match=f"beside the weights of {base}, which are not those of {moved}: "):
            fit_saved(moved, tmp_path / "other", 2, checkpoint, strategy=strategy)
        shutil.copytree(moved, base, dirs_exist_ok=True)
        with pytest.raises(InputError, match=f"beside the weights of {base}, which changed since: "):
            fit_saved(base, tmp_path / "changed", 2, checkpoint, strategy=strategy)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["reward_model", "ppo"])
def test_modules_with_checkpoints_of_their_own_check_the_weights_too(
    kind: str, tiny_policy_dir: Path, tiny_reward_dir: Path, other_policy_dir: Path, tmp_path: Path
) -> None:
    def run(policy: Path, reward: Path, resume: str | None) -> None:
        options = {"default_root_dir": tmp_path, "callbacks": [RunCheckpoint(1)], "enable_checkpointing": True}
        if kind == "ppo":
            module = make_module(policy, iterations=2, reward=ModelReward(str(reward)), **LORA)
            fit(module, [prompts(4)], ckpt_path=resume, **options)
        else:
            train(
                make(RewardModelModule, str(policy), **LORA),
                SmallData(policy, BATCHES[:1]),
                ckpt_path=resume,
                **options,
            )

    run(tiny_policy_dir, tiny_reward_dir, None)
    saved = str(latest(tmp_path / "checkpoints"))
    with pytest.raises(InputError, match=f"of {tiny_policy_dir}, which are not those of {other_policy_dir}"):
        run(other_policy_dir, tiny_reward_dir, saved)
    if kind == "ppo":  # its critic has an adapter too, beside the reward model's weights
        model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)
        model.model.embed_tokens.weight.data.mul_(1.1)
        shutil.copytree(tiny_reward_dir, tmp_path / "reward")
        model.save_pretrained(tmp_path / "reward")
        with pytest.raises(InputError, match=f"of {tiny_reward_dir}, which are not those of {tmp_path / 'reward'}"):
            run(tiny_policy_dir, tmp_path / "reward", saved)


def test_options_of_adapters_need_a_rank(tiny_policy_dir: Path) -> None:
    for name, value in (("alpha", 8.0), ("targets", ["q_proj"])):
        with pytest.raises(InputError, match=f"model.lora.{name}: .* has no meaning without model.lora.rank"):
            make(SFTModule, str(tiny_policy_dir), lora={name: value})
