"""One training step of SFT, DPO or PPO, and the gradients it left; test_training_gradients.py runs it in one process
and, as a script, in two."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from making import make
from ppo_harness import TokenReward, fit, prompts
from processes import run_cases
from small_data import SmallData, train
from tiny_models import make_config, make_tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.collectives import all_gather_objects
from rlhf_lightning.models.sharding import full_state_dict
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.experience import Experience
from rlhf_lightning.training.optimizer import AdamWOptions

# Three micro-batches to the one optimizer step; with two processes one of them gets a filler in the last.
BATCHES = [[0, 1, 2, 3], [4, 5, 6], [7]]
DPO = {"beta": 0.5, "sft_coef": 0.3}
PPO = {
    "iterations": 1,
    "sampling": {"max_new_tokens": 6, "temperature": 0.8},
    "kl": {"loss_coef": 0.1},
    "critic": {"kind": "head", "clip": 0.2, "coef": 0.5},
    "objective": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.35, "entropy_coef": 0.05},
    "update": {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 24, "max_grad_norm": None},
}
PROMPTS = 7


def save_model(name: str, folder: Path, seed: int) -> None:
    """A tiny causal LM: ``llama`` with a head of its own, ``gpt2`` with tied weights, ``cohere`` with scaled logits."""
    torch.manual_seed(seed)
    if name == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=1, pad_token_id=0))
    elif name == "cohere":
        model = CohereForCausalLM(CohereConfig(**{**make_config().to_diff_dict(), "logit_scale": 0.3}))
    else:
        model = LlamaForCausalLM(make_config())
    model.save_pretrained(folder)
    make_tokenizer("<pad>").save_pretrained(folder)


class ShiftedPPO(PPOModule):
    """An update in which ratios and values have moved already, some past their clips; keeps what it learnt from."""

    experience: Experience

    def learn(self, e: Any) -> int:
        steps, states = torch.arange(e.log_probs.shape[1]), torch.arange(e.values.shape[1])
        self.experience = replace(
            e,
            log_probs=e.log_probs + 0.4 * torch.sin(e.lengths[:, None] + steps),
            values=e.values + 0.4 * torch.cos(e.lengths[:, None] + states),
        )
        return super().learn(self.experience)


class KeptGradients(Callback):
    """The gradients of the last optimizer step, whole, also where they are sharded."""

    def on_train_batch_end(self, trainer: Trainer, module: RLHFModule, *_: Any) -> None:
        self.whole = {}
        for name, parameter in module.policy.named_parameters():
            assert parameter.grad is not None, name
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            self.whole[name] = grad.clone()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """``{"grads": {name: whole tensor}, "weights": likewise, "experience": one dict of tensors a process}``."""
    model, reference, trainer = case["model"], case["reference"], case["trainer"]
    kept = KeptGradients()
    experiences: list[dict[str, Tensor]] = []
    if case["task"] == "ppo":
        module = make(ShiftedPPO, model, TokenReward(), reference=reference, optimizer={"learning_rate": 1e-12}, **PPO)
        fit(module, [own_prompts()], use_distributed_sampler=False, callbacks=[kept], **trainer)
        own = {field.name: getattr(module.experience, field.name) for field in fields(module.experience)}
        experiences = all_gather_objects(own)
    else:
        module = (
            SFTModule(model, optimizer=AdamWOptions(learning_rate=1e-12))
            if case["task"] == "sft"
            else make(DPOModule, model, reference, optimizer={"learning_rate": 1e-12}, **DPO)
        )
        train(module, SmallData(model, BATCHES), accumulate_grad_batches=len(BATCHES), callbacks=[kept], **trainer)
    weights = {name: value.clone() for name, value in full_state_dict(module.policy).items()}
    return {"grads": kept.whole, "weights": weights, "experience": experiences}


def own_prompts() -> PromptBatch:
    """This process's every world-th row."""
    everything = prompts(PROMPTS)
    mine = slice(int(os.environ.get("RANK", 0)), None, int(os.environ.get("WORLD_SIZE", 1)))
    return replace(
        everything,
        tokens=everything.tokens[mine],
        lengths=everything.lengths[mine],
        rows=everything.rows[mine],
        weights=everything.weights[mine],
        prompts=everything.prompts[mine],
    )


if __name__ == "__main__":
    run_cases(run)
