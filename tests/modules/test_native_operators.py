"""The modules compute with the native operators: they are seen by the dispatcher while a module trains."""

from __future__ import annotations

import pytest
from ppo_harness import fit, make_module
from small_data import SmallData, train
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.ops import extension

HEAD = {"linear_token_log_probs", "linear_token_log_probs_backward"}

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="the native operators are not built here")


class Seen(TorchDispatchMode):
    """The names of the native operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_lightning":
            self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_ppo_uses_the_head_gae_and_both_losses(tiny_policy_dir):
    with Seen() as seen:
        fit(make_module(tiny_policy_dir))
    assert seen.names >= HEAD | {"gae", "clipped_policy_loss", "clipped_value_loss"}


def test_dpo_uses_the_head(tiny_policy_dir):
    with Seen() as seen:
        train(DPOModule(str(tiny_policy_dir)), SmallData(tiny_policy_dir, [[0, 1, 2]]))
    assert seen.names == HEAD


def test_sft_uses_the_head_whose_gradients_are_made_in_the_forward(tiny_policy_dir):
    with Seen() as seen:
        train(SFTModule(str(tiny_policy_dir)), SmallData(tiny_policy_dir, [[0, 1, 2]]))
    assert seen.names == {"linear_cross_entropy"}
    with Seen() as seen:  # held out there is no gradient to make
        train(SFTModule(str(tiny_policy_dir)), SmallData(tiny_policy_dir, [[0, 1, 2]], held_out=True))
    assert seen.names == {"linear_cross_entropy", "linear_token_log_probs"}


def test_a_reward_model_has_no_head_to_fuse(tiny_policy_dir):
    with Seen() as seen:
        train(RewardModelModule(str(tiny_policy_dir)), SmallData(tiny_policy_dir, [[0, 1, 2]]))
    assert seen.names == set()
