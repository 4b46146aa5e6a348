"""The routers' auxiliary loss in training: gradients against transformers' function on rows without padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from making import make
from ppo_cases import write_prompts
from ppo_harness import fit, make_module
from processes import results_of
from small_data import SmallData, log_prob, make_pairs, train
from tiny_models import make_config, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import NetworkOptions
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.kto import KTOModule
from rlhf_lightning.modules.on_policy import OnPolicyModule
from rlhf_lightning.modules.online_dpo import OnlineDPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.rejection_sampling import RejectionSamplingModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule

COEFFICIENT, EXPERTS, TOP_K = 0.7, 4, 2
ALL = [[0, 1, 2, 3, 4, 5]]
PPO = {
    "critic": {"kind": "model"},
    "update": {"max_grad_norm": None, "micro_batch_tokens": 10_000},
    "optimizer": {"learning_rate": 1e-12},
}


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral whose config asks for the loss."""
    folder = tmp_path_factory.mktemp("mixtral") / "asking"
    torch.manual_seed(4)
    sizes = {**make_config().to_diff_dict(), "model_type": "mixtral", "sliding_window": None}
    config = MixtralConfig(**sizes, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    config.output_router_logits, config.router_aux_loss_coef = True, COEFFICIENT
    MixtralForCausalLM(config).save_pretrained(folder)
    make_tokenizer("<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def silent(asking: Path) -> Path:
    """The same weights with a config that does not ask."""
    return changed(asking, "silent", output_router_logits=False)


def changed(folder: Path, name: str, **values: Any) -> Path:
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    return copy


class Kept(Callback):
    """The trunks' gradients after the step."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.grads = {
            name: {n: p.grad.clone() for n, p in network.model.base_model.named_parameters()}
            for name, network in module.networks().items()
        }


def grads(module: Any, batches: list[list[int]] = ALL, extra: int = 0, **options: Any) -> dict[str, dict[str, Tensor]]:
    """Of one step in float64; by network."""
    kept, options = Kept(), {"precision": "64-true", **options}
    if isinstance(module, OnPolicyModule):
        fit(module, callbacks=[kept], **options)
    else:
        train(module, SmallData(module.model_folder, batches, extra), callbacks=[kept], **options)
    return kept.grads


def loaded(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    model.get_input_embeddings().padding_idx = None  # id 0 may be sampled
    return model


def balance_of(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Transformers' loss of the rows, each of which is run alone."""
    each = [model.base_model(torch.tensor([row]), output_router_logits=True).router_logits for row in rows]
    return load_balancing_loss_func(tuple(torch.cat(layer) for layer in zip(*each, strict=True)), EXPERTS, TOP_K)


def gradient_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.base_model.named_parameters()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # Norms and transformers' loss compute in float32, whatever the weights are.
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def less(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - theirs[name] for name, value in ours.items()}


def likelihood(model: PreTrainedModel, numbers: list[int]) -> tuple[Tensor, float]:
    """The weighted sum of negative log-likelihoods of the rows, and what it is divided by."""
    pairs = [make_pairs(24)[i] for i in numbers]
    loss = -sum(pair.weight * log_prob(model, pair.prompt, pair.chosen) for pair in pairs)
    return loss, sum(pair.weight * len(pair.chosen) for pair in pairs)


def rows_of(numbers: list[int], *sides: str) -> list[list[int]]:
    pairs = make_pairs(24)
    return [pairs[i].prompt + getattr(pairs[i], side) for side in sides for i in numbers]


@pytest.mark.parametrize("extra", [0, 40])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_gradient_has_the_loss_of_the_real_tokens(asking: Path, extra: int, checkpointing: bool) -> None:
    module = SFTModule(str(asking), network=NetworkOptions(gradient_checkpointing=checkpointing))
    got = grads(module, extra=extra)["policy"]
    model = loaded(asking)
    total, count = likelihood(model, ALL[0])
    balance = balance_of(model, rows_of(ALL[0], "chosen"))
    assert_same(got, gradient_of(model, total / count + COEFFICIENT * balance))
    logged = module.trainer.callback_metrics
    assert float(logged["train/router_loss"]) == pytest.approx(balance.item(), rel=1e-5)
    assert float(logged["train/loss"]) == pytest.approx((total / count).item(), rel=1e-5)  # without it


def test_nothing_is_added_where_the_config_does_not_ask(asking: Path, silent: Path) -> None:
    module = SFTModule(str(silent))
    got = grads(module)["policy"]
    model = loaded(silent)
    total, count = likelihood(model, ALL[0])
    assert_same(got, gradient_of(model, total / count))
    assert "train/router_loss" not in module.trainer.callback_metrics
    assert module.policy.routers is None
    zero = changed(asking, "zero", router_aux_loss_coef=0.0)
    assert_same(grads(SFTModule(str(zero)))["policy"], got)


def test_passes_of_a_step_have_their_weight_in_the_loss(asking: Path) -> None:
    split = [[0, 1, 2], [3], [4, 5]]
    got = grads(SFTModule(str(asking)), split, accumulate_grad_batches=3)["policy"]
    model = loaded(asking)
    parts = [likelihood(model, numbers) for numbers in split]
    balances = [balance_of(model, rows_of(numbers, "chosen")) for numbers in split]
    total = sum(loss + count * COEFFICIENT * balance for (loss, count), balance in zip(parts, balances, strict=True))
    assert_same(got, gradient_of(model, total / sum(count for _, count in parts)))


@pytest.mark.parametrize(
    ("method", "network"), [(DPOModule, "policy"), (KTOModule, "policy"), (RewardModelModule, "reward_model")]
)
def test_methods_on_pairs_add_the_loss_of_both_sides(asking: Path, silent: Path, method: Any, network: str) -> None:
    on, off = (grads(method(str(folder)))[network] for folder in (asking, silent))
    model = loaded(asking)
    assert_same(
        less(on, off), gradient_of(model, COEFFICIENT * balance_of(model, rows_of(ALL[0], "chosen", "rejected")))
    )


def test_kto_on_labelled_rows_adds_the_loss_of_each(asking: Path, silent: Path) -> None:
    found = []
    for folder in (asking, silent):
        kept = Kept()
        data = SmallData(str(folder), ALL, labelled=True)
        train(KTOModule(str(folder)), data, precision="64-true", callbacks=[kept])
        found.append(kept.grads["policy"])
    model = loaded(asking)
    assert_same(less(*found), gradient_of(model, COEFFICIENT * balance_of(model, rows_of(ALL[0], "chosen"))))


@pytest.mark.parametrize(
    "method", [PPOModule, RejectionSamplingModule, OnlineDPOModule], ids=["ppo", "rejection", "online_dpo"]
)
def test_on_policy_updates_add_the_loss_of_their_rows(asking: Path, silent: Path, method: Any) -> None:
    options = {name: value for name, value in PPO.items() if name != "critic" or method is PPOModule}
    modules = [make_module(folder, method=method, **options) for folder in (asking, silent)]
    on, off = (grads(module) for module in modules)
    experience = modules[0].experiences[0]
    counted = experience.weights > 0
    tokens, lengths = (experience.tokens[counted], experience.lengths[counted])
    rows = [
        row[:length].tolist() for row, length in zip(tokens.flatten(0, -2), lengths.flatten().tolist(), strict=True)
    ]
    model = loaded(asking)
    expected = gradient_of(model, COEFFICIENT * balance_of(model, rows))
    assert_same(less(on["policy"], off["policy"]), expected)
    assert modules[0].logged[0]["policy/router_loss"] > 0
    if method is PPOModule:  # the critic of its own is the same mixture
        assert_same(less(on["critic"], off["critic"]), expected)


def test_ddp_and_shards_add_the_same_loss_in_two_processes(asking: Path, tmp_path: Path) -> None:
    """A pass's loss is no sum over its rows, so two runs of two processes, with the same passes, are compared."""
    write_prompts(tmp_path / "prompts.jsonl")
    job = {"policy": str(asking), "data": str(tmp_path / "prompts.jsonl"), "batch_size": 5}
    options = {**PPO, "iterations": 1, "optimizer": {"learning_rate": 3e-3}}
    cases = {s: {**job, "options": options, "trainer": {"strategy": s, "devices": 2}} for s in ("ddp", "fsdp2")}
    results = results_of("ppo_cases.py", cases, tmp_path)
    ddp, fsdp2 = results["ddp"], results["fsdp2"]
    assert all(metrics["policy/router_loss"] > 0 and metrics["critic/router_loss"] > 0 for metrics in ddp["metrics"])
    for name, weight in ddp["weights"].items():
        torch.testing.assert_close(fsdp2["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=name)


def test_what_cannot_have_it_is_refused(asking: Path) -> None:
    with pytest.raises(InputError, match=r"model.*compile_layers.*output_router_logits"):
        grads(make(SFTModule, str(asking), network={"compile_layers": True}))


def test_a_module_that_leaves_it_out_is_refused(asking: Path) -> None:
    class Own(SFTModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            log_probs = self.policy(batch.tokens, batch.lengths, batch.prompt_lengths).log_probs
            self.step.count(batch.weights.sum(), log_probs.sum())
            return -log_probs.sum()

    with pytest.raises(InputError, match="adds none"):
        grads(Own(str(asking)))
