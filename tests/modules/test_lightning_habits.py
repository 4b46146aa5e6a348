"""What users of Lightning do with any module: hparams, load_from_checkpoint, forward, copies, loaders, no Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from ppo_harness import TokenReward, fit, make_module, prompts
from small_data import SmallData, train
from torch.utils.data import DataLoader

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import DPOModule, PPOModule, RewardModelModule, SFTModule
from rlhf_lightning.rollout.native import NativeEngine
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import SamplingOptions


def test_hparams_show_every_option_as_plain_data() -> None:
    module = PPOModule("folder", TokenReward(), kl=KLOptions(coef=0.3), iterations=7)
    assert module.hparams.model == "folder" and module.hparams["iterations"] == 7
    assert module.hparams["kl"]["coef"] == 0.3 and module.hparams["update"]["epochs"] == 4
    assert module.hparams["reward"].endswith(".TokenReward>")


class Mine(SFTModule):
    """A user's own."""

    def __init__(self, model: str, mine: float = 1.0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.mine = mine


def test_hparams_of_a_subclass_have_its_own_options_too() -> None:
    module = Mine(model="folder", mine=2.0, optimizer=AdamWOptions(learning_rate=0.5))
    assert module.hparams["mine"] == 2.0 and module.hparams["optimizer"]["learning_rate"] == 0.5


@pytest.mark.parametrize("cls", [SFTModule, DPOModule, RewardModelModule])
def test_a_checkpoint_is_loaded_as_lightning_users_do(cls: type, tiny_policy_dir: Path, tmp_path: Path) -> None:
    module = cls(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
    kept = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trained = train(module, SmallData(tiny_policy_dir, [[0, 1]]), callbacks=[kept], enable_checkpointing=True)
    again = cls.load_from_checkpoint(tmp_path / "last.ckpt", seed=5)
    assert again.optimizer_options.learning_rate == 0.01 and again.seed == 5
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items())


def test_on_policy_checkpoints_too_and_the_reward_is_given_again(tiny_policy_dir: Path, tmp_path: Path) -> None:
    module = make_module(tiny_policy_dir, kl={"coef": 0.3})
    fit(module).save_checkpoint(tmp_path / "it.ckpt")
    again = PPOModule.load_from_checkpoint(tmp_path / "it.ckpt", reward=TokenReward())
    assert again.iteration == 1 and again.kl.coef == 0.3
    rollout = again.generate(prompts(3))
    assert torch.equal(again.score(rollout), TokenReward()(rollout))
    state = again.policy.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.policy.state_dict().items())


def test_a_folder_is_no_checkpoint_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint file"):
        SFTModule.load_from_checkpoint(tmp_path)


def test_generate_and_forward_without_a_trainer(tiny_policy_dir: Path) -> None:
    module = SFTModule(str(tiny_policy_dir), sampling=SamplingOptions(max_new_tokens=4))
    with pytest.raises(InputError, match="SFTModule: there is no model yet; call configure_model"):
        module(torch.tensor([[4, 5]]))
    module.configure_model()
    with pytest.raises(InputError, match=r"generate: takes a PromptBatch, not a list; PreferenceDataModule\(FILE\)"):
        module.generate(["a question"])
    rollout = module.generate(prompts(3))
    scores = module(rollout.tokens, rollout.lengths, rollout.prompt_lengths)
    torch.testing.assert_close(scores.log_probs, rollout.log_probs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_copy_is_a_module_of_its_own(kind: str, tiny_policy_dir: Path) -> None:
    module = SFTModule(str(tiny_policy_dir)) if kind == "sft" else make_module(tiny_policy_dir)
    module.configure_model()
    twin = copy.deepcopy(module)
    assert twin.hparams == module.hparams and twin.policy is not module.policy
    with torch.no_grad():
        next(twin.policy.parameters()).add_(1.0)
    assert not torch.equal(next(twin.policy.parameters()), next(module.policy.parameters()))
    if kind == "ppo":
        assert copy.deepcopy(module.actors).policy is not module.policy


def test_weight_averaging_runs(tiny_policy_dir: Path) -> None:
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    train(module, SmallData(tiny_policy_dir, [[0, 1], [2, 3]]), callbacks=[averaging], max_epochs=3)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_plain_loader_of_batches_serves(tiny_policy_dir: Path) -> None:
    module = make_module(tiny_policy_dir)
    trainer = fit(module, [prompts(4)])
    (metrics,) = trainer.validate(module, DataLoader([prompts(4)], batch_size=None), verbose=False)
    assert {"val/scores", "val/kl"} <= set(metrics)


class Counting(NativeEngine):
    """Counts how often it was handed weights."""

    received = 0

    def receive(self, policy: object) -> None:
        self.received += 1


@pytest.mark.parametrize("cls", [SFTModule, DPOModule])
def test_an_engine_gets_the_weights_again_after_each_setup(cls: type, tiny_policy_dir: Path) -> None:
    engine = Counting()
    module = cls(str(tiny_policy_dir), engine=engine, sampling=SamplingOptions(max_new_tokens=2))
    for stage in (1, 2):
        Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).predict(
            module, DataLoader([prompts(2)], batch_size=None)
        )
        assert engine.received == stage


def test_a_subclass_with_options_of_its_own_is_loaded_too(tiny_policy_dir: Path, tmp_path: Path) -> None:
    module = Mine(str(tiny_policy_dir), mine=2.0, optimizer=AdamWOptions(learning_rate=0.01))
    kept = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    train(module, SmallData(tiny_policy_dir, [[0, 1]]), callbacks=[kept], enable_checkpointing=True)
    again = Mine.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.mine == 2.0 and again.optimizer_options.learning_rate == 0.01


def test_what_a_checkpoint_does_not_hold_is_asked_for(tiny_policy_dir: Path, tmp_path: Path) -> None:
    fit(make_module(tiny_policy_dir)).save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(InputError, match=r"reward: the checkpoint was made with <.*TokenReward>.*give reward="):
        PPOModule.load_from_checkpoint(tmp_path / "it.ckpt")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kl": 0.1}, "PPOModule.kl: expected KLOptions, got 0.1"),
        ({"kl": None}, "PPOModule.kl: expected KLOptions, got None"),
        ({"iterations": -1}, "PPOModule.iterations: expected a whole number above 0, got -1"),
        ({"ptx_coef": -0.5}, "PPOModule.ptx_coef: expected a number from 0 up, got -0.5"),
    ],
)
def test_wrong_arguments_are_refused_in_a_script_too(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        PPOModule("folder", **options)
    with pytest.raises(TypeError, match=r"PPOModule.*unexpected keyword argument 'kl_coef'"):
        PPOModule("folder", kl_coef=0.1)
