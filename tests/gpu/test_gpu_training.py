"""One PPO iteration of the demo's world on the GPU: it uses the native kernels, and learns what the CPU learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.batches import Rollout
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.demo.corpus import build_corpus
from rlhf_lightning.demo.start import save_start, train_tokenizer
from rlhf_lightning.models.building import NetworkOptions
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.ops import extension
from rlhf_lightning.rewards.function import FunctionReward
from rlhf_lightning.training.critic import CriticOptions
from rlhf_lightning.training.kl_control import KLOptions
from rlhf_lightning.training.minibatches import UpdateOptions
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import RolloutOptions

ROWS = 16


class Recorder(PPOModule):
    """Keeps what it sampled and logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts: list[Rollout] = []
        self.logged: list[dict[str, float]] = []

    def sample(self, batch: Any) -> Any:
        rollout, scores = super().sample(batch)
        self.rollouts.append(rollout)
        return rollout, scores

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.append({name: float(value) for name, value in dictionary.items()})
        super().log_dict(dictionary, *args, **kwargs)


class Seen(TorchDispatchMode):
    """The native operators that were called, and the kinds of device of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_lightning":
            self.calls.add((func._schema.name.split("::")[1], args[0].device.type))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's questions, its tokenizer and its untrained model, small."""
    folder = tmp_path_factory.mktemp("world")
    corpus = build_corpus(seed=0, train=64, held_out=1)
    texts = [question.prompt + answer for question, answer in zip(corpus.train, corpus.train_answers, strict=True)]
    save_start(folder / "start", train_tokenizer(texts, 400), hidden=32, layers=2, seed=0)
    lines = (json.dumps({"prompt": question.prompt}) + "\n" for question in corpus.train[:ROWS])
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def iterate(
    world: Path, device: torch.device, precision: str = "32-true", **options: Any
) -> tuple[Recorder, set[tuple[str, str]]]:
    """One iteration of configs/demo/ppo.yaml, with the gold reward in place of a trained one."""
    reward = FunctionReward("rlhf_lightning.demo.gold:gold_reward")
    module = Recorder(
        str(world / "start"),
        reward,
        iterations=1,
        sampling=RolloutOptions(max_new_tokens=24),
        kl=KLOptions(coef=0.1),
        critic=CriticOptions(learning_rate=1e-3),
        update=UpdateOptions(epochs=2, minibatches=2),
        optimizer=AdamWOptions(learning_rate=3e-4, eps=1e-5),
        **options,
    )
    data = PreferenceDataModule(str(world / "prompts.jsonl"), batch_size=ROWS, validation_fraction=0.0)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with Seen() as seen:
        trainer.fit(module, datamodule=data)
    return module, seen.calls


def test_one_iteration_learns_what_the_cpu_learns(device, world):
    module, calls = iterate(world, device)
    plain, _ = iterate(world, torch.device("cpu"))
    if extension.LOADED and extension.CHOICE != "reference":
        used = {"linear_token_log_probs", "linear_token_log_probs_backward", "gae"}
        used |= {"clipped_policy_loss", "clipped_value_loss"}
        assert calls >= {(name, device.type) for name in used}
    assert module.rollouts[0].tokens.device.type == device.type
    # Draws are functions of seed and place alone, so the same responses are sampled but for a rounding at an edge.
    assert module.rollouts[0].responses == plain.rollouts[0].responses
    (metrics,), (expected,) = module.logged, plain.logged
    assert metrics["policy/steps"] == 4
    for name in (
        "objective/scores",
        "objective/kl",
        "policy/loss",
        "critic/loss",
        "policy/entropy",
        "policy/grad_norm",
    ):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name


def test_compiled_layers_learn_the_same(device, world):
    module, _ = iterate(world, device, network=NetworkOptions(compile_layers=True))
    eager, _ = iterate(world, device)
    assert module.rollouts[0].responses == eager.rollouts[0].responses
    (metrics,), (expected,) = module.logged, eager.logged
    for name in ("policy/loss", "critic/loss", "policy/entropy", "policy/grad_norm", "critic/grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_one_iteration_in_mixed_precision(device, world, precision):
    module, calls = iterate(world, device, precision)
    (metrics,) = module.logged
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values()), metrics
    assert abs(metrics["rollout/logprob_gap"]) < 0.1
    assert {kind for _, kind in calls} <= {device.type}
