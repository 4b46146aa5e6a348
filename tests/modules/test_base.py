"""The shared base: divergence, schedules, clipping, strategies, what is trained, generation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from making import make, merged
from small_data import SmallData, train
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import DemonstrationBatch, PromptBatch
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.models.building import NetworkOptions
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import SamplingOptions

ROWS = [[0, 1, 2, 3]] * 6


class Poisoned(SFTModule):
    """Its loss, or with ``what="gradient"`` only its gradient, is infinite at the third step."""

    what = "loss"

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 2:
            weight = next(self.policy.parameters())
            if self.what == "gradient":
                return loss + torch.sqrt((weight * 0.0).sum())  # 0, with a gradient of 0 / 0
            self.step.check(loss * math.nan)
            return loss * math.nan
        return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_before_the_step(tiny_policy_dir: Path, what: str) -> None:
    module = Poisoned(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
    module.what = what
    told = "no checkpoint was saved before; start again with a lower model.optimizer.learning_rate"
    with pytest.raises(TrainingDiverged, match=f"the {what} is NaN or infinite at optimizer step 3; {told}"):
        train(module, SmallData(tiny_policy_dir, ROWS))
    assert module.trainer.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


class Recorded(SFTModule):
    """Remembers the learning rate that every step used."""

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen = [*getattr(self, "seen", []), optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"optimizer": {"warmup_steps": 4}}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"optimizer": {"schedule": "linear", "warmup_steps": 2}}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ({"optimizer": {"schedule": "cosine"}}, [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]),
    ],
)
def test_schedules(tiny_policy_dir: Path, options: dict, expected: list[float]) -> None:
    module = make(Recorded, str(tiny_policy_dir), **merged({"optimizer": {"learning_rate": 0.1}}, options))
    train(module, SmallData(tiny_policy_dir, ROWS))
    assert module.seen == pytest.approx([0.1 * factor for factor in expected])


def test_a_schedule_without_an_end_is_refused(tiny_policy_dir: Path) -> None:
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(schedule="cosine"))
    with pytest.raises(InputError, match=r"model.optimizer.schedule: cosine needs an end; set trainer.max_steps"):
        train(module, SmallData(tiny_policy_dir, ROWS), max_epochs=-1)


def test_clipping_bounds_the_step_and_the_norm_before_it_is_logged(tiny_policy_dir: Path) -> None:
    moved = {}
    for clip in (None, 0.01):
        # In effect plain gradient descent, see test_sft.py.
        module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=1.0, eps=1e3))
        data = SmallData(tiny_policy_dir, ROWS[:1])
        after = train(module, data, gradient_clip_val=clip, precision="64-true")
        fresh = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=1e-12))
        before = train(fresh, SmallData(tiny_policy_dir, ROWS[:1]), precision="64-true")
        squares = sum(float((after[name] - before[name]).square().sum()) for name in after)
        moved[clip] = math.sqrt(squares) * 1e3, float(module.trainer.logged_metrics["train/grad_norm"])
    assert moved[None][0] == pytest.approx(moved[None][1], rel=1e-2)
    assert moved[0.01][0] == pytest.approx(0.01, rel=1e-2)
    assert moved[0.01][1] == pytest.approx(moved[None][1], rel=1e-4)


def test_weight_decay_leaves_norms_alone(tiny_policy_dir: Path) -> None:
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(weight_decay=0.1))
    train(module, SmallData(tiny_policy_dir, ROWS[:1]))
    decayed = {
        id(p): group["weight_decay"] for group in module.trainer.optimizers[0].param_groups for p in group["params"]
    }
    for name, parameter in module.named_parameters():
        assert decayed[id(parameter)] == (0.0 if "norm" in name else 0.1), name


@pytest.mark.parametrize(("scaler", "fused"), [(None, True), (torch.amp.GradScaler("cpu"), False)])
def test_a_scaler_gets_an_optimizer_that_leaves_the_scale_to_it(
    tiny_policy_dir: Path, scaler: torch.amp.GradScaler | None, fused: bool
) -> None:
    """A fused step would take the scale off after the gradients were measured and clipped."""
    module = SFTModule(str(tiny_policy_dir))
    train(module, SmallData(tiny_policy_dir, ROWS))
    module.trainer.precision_plugin.scaler = scaler
    optimizer = module.configure_optimizers()["optimizer"]
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused


def test_fsdp1_is_refused_and_the_message_names_fsdp2(tiny_policy_dir: Path) -> None:
    class CpuFSDP(FSDPStrategy):
        pass

    module = SFTModule(str(tiny_policy_dir))
    module.trainer = Trainer(accelerator="cpu", devices=1, strategy=CpuFSDP(), logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match="CpuFSDP is not supported; use ddp, or fsdp2"):
        module.setup("fit")


def test_fsdp2_on_one_process_is_the_same_as_none(tiny_policy_dir: Path) -> None:
    """Epsilon is large: a gradient of rounding alone would otherwise move its weight by a whole learning rate."""
    data = [SmallData(tiny_policy_dir, ROWS) for _ in range(2)]
    options = AdamWOptions(learning_rate=0.01, eps=1e-3)
    expected = train(SFTModule(str(tiny_policy_dir), optimizer=options), data[0], gradient_clip_val=1.0)
    module = SFTModule(str(tiny_policy_dir), optimizer=options)
    try:
        got = train(module, data[1], gradient_clip_val=1.0, strategy="fsdp2")
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tiny_policy_dir: Path) -> None:
    trained = [
        train(
            SFTModule(str(tiny_policy_dir), network=NetworkOptions(gradient_checkpointing=on)),
            SmallData(tiny_policy_dir, ROWS[:2]),
        )
        for on in (False, True)
    ]
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_log_probs_stay_float32_under_every_precision(tiny_policy_dir: Path, precision: str) -> None:
    class Looked(SFTModule):
        def configure_model(self) -> None:
            super().configure_model()
            stock = self.policy.cross_entropy

            def looked(
                tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, weights: Tensor
            ) -> tuple[Tensor, Tensor]:
                self.looked = (*stock(tokens, lengths, prompt_lengths, weights), weights)
                return self.looked[:2]

            self.policy.cross_entropy = looked

    module = Looked(str(tiny_policy_dir))
    train(module, SmallData(tiny_policy_dir, ROWS[:1]), precision=precision)
    assert [x.dtype for x in module.looked] == [torch.float32] * 3  # loss, log-probs, weights


def prompts(tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    texts = ["the cat sees", "why not"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    tokens = torch.zeros(2, max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return PromptBatch(
        tokens, torch.tensor([len(row) for row in rows]), torch.arange(2), torch.tensor([1.0, 0.0]), texts, {}
    )


def test_generation_and_prediction(tiny_policy_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    module = SFTModule(str(tiny_policy_dir), seed=3, sampling=SamplingOptions(max_new_tokens=5))
    train(module, SmallData(tiny_policy_dir, ROWS[:1]))
    module.eval()
    batch = prompts(tiny_tokenizer)
    rollout = module.generate(batch, iteration=2)
    assert rollout.response_lengths.max() <= 5
    assert torch.equal(rollout.tokens, module.generate(batch, iteration=2).tokens)
    assert module.generate(batch, max_new_tokens=1).response_lengths.tolist() == [1, 1]
    rows = module.predict_step(batch, 0)
    assert [(row["row"], row["prompt"]) for row in rows] == [(0, "the cat sees")]  # the second is a filler
    assert rows[0]["response"] == module.generate(batch).responses[0]


def test_export_is_a_policy_folder(tiny_policy_dir: Path, tmp_path: Path) -> None:
    module = SFTModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
    trained = train(module, SmallData(tiny_policy_dir, ROWS[:1]))
    module.export(tmp_path / "model")
    again = SFTModule(str(tmp_path / "model"), optimizer=AdamWOptions(learning_rate=1e-12))
    reloaded = train(again, SmallData(tmp_path / "model", ROWS[:1]))
    for name, value in trained.items():
        torch.testing.assert_close(reloaded[name], value)
