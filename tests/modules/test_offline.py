"""KTO, ORPO and SimPO: their gradients against losses written from the papers, pair by pair, in float64."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from making import make
from small_data import Pair, SmallData, desirable, log_prob, make_pairs, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.positions import response_mask
from rlhf_lightning.modules.kto import KTOModule, mismatched
from rlhf_lightning.modules.orpo import ORPOModule
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.modules.simpo import SimPOModule
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import Rows

DESCENT = {"optimizer": {"learning_rate": 1.0, "eps": 1e6}}  # plain gradient descent in effect, see test_sft.py
ALL = list(range(6))
BETA, GAMMA, ODDS, DESIRABLE, UNDESIRABLE = 0.7, 0.4, 0.6, 1.3, 0.8


def kto(pairs: list[Pair], policy: nn.Module, reference: nn.Module) -> list[Tensor]:
    """Section 4: values against a z0 of prompts with the responses of the next pair, which carries no gradient."""

    def ratio(prompt: list[int], response: list[int]) -> Tensor:
        return log_prob(policy, prompt, response) - log_prob(reference, prompt, response)

    total = 0.0
    for i, pair in enumerate(pairs):
        other = pairs[(i + 1) % len(pairs)]
        if other is not pair:
            mixed = ratio(pair.prompt, other.chosen) + ratio(pair.prompt, other.rejected)
            total += pair.weight * mixed.item() / 2
    z0 = max(0.0, total / sum(pair.weight for pair in pairs))
    losses = []
    for pair in pairs:
        value = DESIRABLE / (1 + torch.exp(-BETA * (ratio(pair.prompt, pair.chosen) - z0)))
        other = UNDESIRABLE / (1 + torch.exp(-BETA * (z0 - ratio(pair.prompt, pair.rejected))))
        losses.append(((DESIRABLE - value) + (UNDESIRABLE - other)) / 2)
    return losses


def kto_labelled(rows: list[Pair], labels: list[bool], policy: nn.Module, reference: nn.Module) -> list[Tensor]:
    """The same of one response to each prompt, good or bad by itself."""

    def ratio(prompt: list[int], response: list[int]) -> Tensor:
        return log_prob(policy, prompt, response) - log_prob(reference, prompt, response)

    following = [*rows[1:], rows[0]]
    mixed = [row.weight * ratio(row.prompt, other.chosen).item() for row, other in zip(rows, following, strict=True)]
    z0 = max(0.0, sum(mixed) / sum(row.weight for row in rows)) if len(rows) > 1 else 0.0
    losses = []
    for row, good in zip(rows, labels, strict=True):
        ahead = BETA * (ratio(row.prompt, row.chosen) - z0)
        value = DESIRABLE / (1 + torch.exp(-ahead)) if good else UNDESIRABLE / (1 + torch.exp(ahead))
        losses.append((DESIRABLE if good else UNDESIRABLE) - value)
    return losses


def orpo(pairs: list[Pair], policy: nn.Module, reference: nn.Module) -> list[Tensor]:
    """Equations 2 to 7."""
    losses = []
    for pair in pairs:
        logs = [log_prob(policy, pair.prompt, text) / len(text) for text in (pair.chosen, pair.rejected)]
        chosen, rejected = (log.exp() / (1 - log.exp()) for log in logs)
        losses.append(-logs[0] - ODDS * torch.log(1 / (1 + torch.exp(-torch.log(chosen / rejected)))))
    return losses


def simpo(pairs: list[Pair], policy: nn.Module, reference: nn.Module) -> list[Tensor]:
    """Equation 6."""
    losses = []
    for pair in pairs:
        chosen, rejected = (
            BETA / len(text) * log_prob(policy, pair.prompt, text) for text in (pair.chosen, pair.rejected)
        )
        losses.append(torch.log(1 + torch.exp(-(chosen - rejected - GAMMA))))
    return losses


ORACLES = {"kto": kto, "orpo": orpo, "simpo": simpo}


def module_of(name: str, model: Path, reference: Path) -> PreferenceModule:
    if name == "kto":
        weights = {"desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE}
        return make(KTOModule, str(model), reference=str(reference), beta=BETA, **weights, **DESCENT)
    if name == "orpo":
        return make(ORPOModule, str(model), odds_coef=ODDS, **DESCENT)
    return make(SimPOModule, str(model), beta=BETA, gamma=GAMMA, **DESCENT)


@pytest.mark.parametrize("batches", [[ALL], [[0, 1, 2], [3], [4, 5]]], ids=["one batch", "three micro-batches"])
@pytest.mark.parametrize("name", [*ORACLES])
def test_gradient_is_that_of_the_paper(
    tiny_policy_dir: Path, other_policy_dir: Path, name: str, batches: list[list[int]]
) -> None:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (tiny_policy_dir, other_policy_dir)
    )
    rows = make_pairs(24)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:  # KTO's z0 is that of the batch
        pairs = [rows[i] for i in batch]
        for pair, loss in zip(pairs, ORACLES[name](pairs, policy, reference), strict=True):
            total = total + pair.weight * loss
    (total / sum(rows[i].weight for i in ALL)).backward()
    data = SmallData(tiny_policy_dir, batches, extra=2)
    module = module_of(name, tiny_policy_dir, other_policy_dir)
    after = train(module, data, precision="64-true", accumulate_grad_batches=3)
    for parameter_name, parameter in policy.named_parameters():
        got = (parameter.detach() - after[f"model.{parameter_name}"]) * 1e6
        assert parameter.grad is not None
        torch.testing.assert_close(
            got, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )


# The second split has a micro-batch of desirable responses alone, and one of a single undesirable one.
@pytest.mark.parametrize("batches", [[ALL], [[1, 2, 4], [3], [0, 5]]], ids=["one batch", "three micro-batches"])
def test_gradient_on_labelled_responses_is_that_of_the_paper(
    tiny_policy_dir: Path, other_policy_dir: Path, batches: list[list[int]]
) -> None:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for folder in (tiny_policy_dir, other_policy_dir)
    )
    rows = make_pairs(24)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        losses = kto_labelled([rows[i] for i in batch], [desirable(i) for i in batch], policy, reference)
        total = total + sum(rows[i].weight * loss for i, loss in zip(batch, losses, strict=True))
    expected = total / sum(rows[i].weight for i in ALL)
    expected.backward()
    module = module_of("kto", tiny_policy_dir, other_policy_dir)
    data = SmallData(tiny_policy_dir, batches, extra=2, labelled=True)
    after = train(module, data, precision="64-true", accumulate_grad_batches=3)
    metrics = module.trainer.logged_metrics
    assert float(metrics["train/baseline"]) > 0.01  # else this would say nothing of z0
    assert float(metrics["train/loss"]) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in policy.named_parameters():
        got = (parameter.detach() - after[f"model.{name}"]) * 1e6
        assert parameter.grad is not None
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_labels_alone_teach_and_are_counted_apart(tiny_policy_dir: Path) -> None:
    module = KTOModule(str(tiny_policy_dir), beta=0.5, optimizer=AdamWOptions(learning_rate=0.005))
    train(module, SmallData(tiny_policy_dir, [list(range(13))] * 10, held_out=True, labelled=True))
    metrics = module.trainer.callback_metrics
    assert float(metrics["val/accuracy"]) > 0.8
    assert float(metrics["val/rewards_chosen"]) > 0 > float(metrics["val/rewards_rejected"])
    assert "val/margin" not in metrics


def test_a_batch_of_desirable_responses_alone_has_no_rejected_reward(tiny_policy_dir: Path) -> None:
    module = KTOModule(str(tiny_policy_dir), desirable_weight=3.0, optimizer=AdamWOptions(learning_rate=1e-12))
    train(module, SmallData(tiny_policy_dir, [[1, 2, 4]], labelled=True))
    metrics = module.trainer.logged_metrics
    assert float(metrics["train/loss"]) == pytest.approx(0.5 * 3.0)
    assert float(metrics["rewards/chosen"]) == 0.0 and math.isnan(float(metrics["rewards/rejected"]))


def test_kto_reads_labelled_rows(tiny_policy_dir: Path, tmp_path: Path) -> None:
    words = ("one", "two", "three", "four", "five")
    rows = [{"prompt": f"{a} {b}", "completion": a, "label": a < b} for a in words for b in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = KTOModule(str(tiny_policy_dir), beta=0.5, optimizer=AdamWOptions(learning_rate=0.005))
    path = str(tmp_path / "rows.jsonl")
    train(module, PreferenceDataModule(path, val_path=path, batch_size=6), max_epochs=6)
    metrics = module.trainer.callback_metrics
    assert float(metrics["val/accuracy"]) > 0.8 and "val/margin" not in metrics


def test_the_oracle_of_kto_has_a_baseline_above_0(tiny_policy_dir: Path, other_policy_dir: Path) -> None:
    """Else the test above would say nothing of z0."""
    module = module_of("kto", tiny_policy_dir, other_policy_dir)
    train(module, SmallData(tiny_policy_dir, [ALL]))
    assert float(module.trainer.logged_metrics["train/baseline"]) > 0.01


def test_kto_starts_at_half_its_weights(tiny_policy_dir: Path) -> None:
    module = KTOModule(str(tiny_policy_dir), desirable_weight=3.0, optimizer=AdamWOptions(learning_rate=1e-12))
    train(module, SmallData(tiny_policy_dir, [ALL]))
    metrics = module.trainer.logged_metrics
    assert float(metrics["train/loss"]) == pytest.approx(0.5 * (3.0 + 1.0) / 2, abs=1e-6)
    assert float(metrics["train/baseline"]) == float(metrics["rewards/chosen"]) == 0.0


def pairs_of(*texts: tuple[list[int], list[int], list[int]]) -> Rows:
    """``(prompt, chosen, rejected)`` of each, padded by one more than needed."""
    sequences = [text[0] + text[side] for side in (1, 2) for text in texts]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.full((len(sequences), int(lengths.max()) + 1), 9)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    prompts = torch.tensor([len(text[0]) for text in texts] * 2)
    return Rows(tokens, lengths, prompts, response_mask(prompts, lengths))


def texts_of(rows: Rows) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(rows.tokens, rows.lengths.tolist(), strict=True)]


def test_a_prompt_never_meets_a_response_to_itself() -> None:
    a, b, filler = ([1, 2], [3], [4, 5]), ([6], [7, 7, 7], [8]), ([5], [2], [2])
    again = ([1, 2], [3], [6])  # another pair of a's prompt
    rows, weights = mismatched(pairs_of(a, again, b, filler), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    chosen, rejected = texts_of(rows)[:4], texts_of(rows)[4:]
    assert chosen == [[1, 2, 7, 7, 7], [1, 2, 7, 7, 7], [6, 3], [5, 3]]
    assert rejected == [[1, 2, 8], [1, 2, 8], [6, 4, 5], [5, 4, 5]]
    assert rows.prompt_lengths.tolist() == [2, 2, 1, 1] * 2
    assert weights.tolist() == [1.0, 2.0, 3.0, 0.0] * 2


def test_one_prompt_alone_has_no_baseline() -> None:
    a, again = ([1, 2], [3], [4, 5]), ([1, 2], [3], [6])
    rows, weights = mismatched(pairs_of(a, again), torch.ones(2))
    assert texts_of(rows) == [[1, 2, 3], [1, 2, 3], [1, 2, 4, 5], [1, 2, 6]]
    assert weights.tolist() == [0.0] * 4


@pytest.mark.parametrize("labelled", [False, True])
def test_a_batch_without_a_partner_is_warned_about(
    tiny_policy_dir: Path, other_policy_dir: Path, labelled: bool
) -> None:
    for rows in ([0], ALL):
        module = KTOModule(
            str(tiny_policy_dir), reference=str(other_policy_dir), optimizer=AdamWOptions(learning_rate=1e-12)
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(module, SmallData(tiny_policy_dir, [rows], labelled=labelled))
        alone = len(rows) == 1
        assert any("a batch has one prompt alone, so its baseline z0 is 0" in str(w.message) for w in told) == alone
        assert (float(module.trainer.logged_metrics["train/baseline"]) == 0.0) == alone


def test_a_response_that_a_longer_prompt_may_meet_has_to_fit(tiny_policy_dir: Path) -> None:
    module = KTOModule(str(tiny_policy_dir))
    data = SmallData(tiny_policy_dir, [ALL])
    data.longest_prompt, data.longest_response = 40, 10_000
    with pytest.raises(InputError, match="10040"):
        train(module, data)


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_methods_without_a_reference_load_none(tiny_policy_dir: Path, tmp_path: Path, name: str) -> None:
    module = module_of(name, tiny_policy_dir, tmp_path / "there is none")
    train(module, SmallData(tiny_policy_dir, [ALL]))
    assert module.reference is None


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (KTOModule, {"beta": 0.5, "optimizer": {"learning_rate": 0.005}}),
        (ORPOModule, {"odds_coef": 1.0, "optimizer": {"learning_rate": 0.005}}),
        (SimPOModule, {"optimizer": {"learning_rate": 0.005}}),
    ],
)
def test_training_prefers_the_chosen(tiny_policy_dir: Path, module: type, options: dict) -> None:
    trained = make(module, str(tiny_policy_dir), **options)
    train(trained, SmallData(tiny_policy_dir, [list(range(13))] * 10, held_out=True))
    metrics = trained.trainer.callback_metrics
    assert float(metrics["val/accuracy"]) > 0.9
    assert math.isfinite(float(metrics["val/loss"])) and float(metrics["val/margin"]) > 0
