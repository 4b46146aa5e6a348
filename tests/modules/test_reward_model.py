"""The reward model module: loss, metrics and normalisation against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_data import SmallData, make_pairs, train
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.modules.reward_model import RewardModelModule, wins
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.totals import Totals


class Fixed(RewardModelModule):
    """Scores that a test sets, instead of a model's."""

    def given(self, chosen: list[float], rejected: list[float]) -> None:
        self.fixed = torch.tensor(chosen), torch.tensor(rejected)

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        return self.fixed


def pairs(chosen_lengths: list[int], rejected_lengths: list[int], weights: list[float]) -> PreferenceBatch:
    def side(lengths: list[int]) -> DemonstrationBatch:
        total = torch.tensor(lengths) + 2
        return DemonstrationBatch(
            torch.zeros(len(lengths), int(total.max()), dtype=torch.int64),
            total,
            torch.full((len(lengths),), 2),
            torch.tensor(weights),
        )

    return PreferenceBatch(
        side(chosen_lengths), side(rejected_lengths), torch.zeros(len(weights)), torch.tensor(weights)
    )


def measured(module: RewardModelModule, batch: PreferenceBatch) -> dict[str, float]:
    totals = Totals()
    module.held_out_totals = totals
    module.validation_step(batch, 0)
    return module.held_out_metrics(totals)


def test_metrics_by_hand() -> None:
    module = Fixed("unused")
    # Three pairs whose chosen one is longer (won, won, lost), one whose chosen one is shorter (a tie), one of equal
    # lengths (won), and a filler.
    module.given([2.0, 1.0, 0.0, 1.0, 3.0, -9.0], [0.0, 0.0, 1.0, 1.0, 0.0, 9.0])
    metrics = measured(module, pairs([5, 5, 5, 2, 3, 1], [3, 3, 3, 4, 3, 2], [1.0, 1.0, 1.0, 1.0, 2.0, 0.0]))
    assert metrics["accuracy"] == pytest.approx(3.5 / 5)
    assert metrics["longer_wins"] == pytest.approx(3.5 / 5)
    assert metrics["accuracy_length_balanced"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["margin"] == pytest.approx((2 + 1 - 1 + 0 + 3) / 5)
    assert metrics["reward_mean"] == pytest.approx((7 + 2) / 10)
    assert metrics["reward_std"] == pytest.approx(math.sqrt((4 + 1 + 0 + 1 + 9 + 0 + 0 + 1 + 1 + 0) / 10 - 0.81))
    losses = [math.log1p(math.exp(-d)) for d in (2.0, 1.0, -1.0, 0.0, 3.0)]
    assert metrics["loss"] == pytest.approx((sum(losses) + losses[-1]) / 6)  # the last pair weighs two


def test_a_model_of_the_length_alone_gets_half_of_the_balanced_pairs() -> None:
    module = Fixed("unused")
    chosen, rejected = [9, 8, 7, 6, 2], [3, 4, 5, 1, 8]
    module.given([float(length) for length in chosen], [float(length) for length in rejected])
    metrics = measured(module, pairs(chosen, rejected, [1.0] * 5))
    assert metrics["accuracy"] == metrics["longer_wins"] == pytest.approx(0.8)
    assert metrics["accuracy_length_balanced"] == pytest.approx(0.5)


def test_calibration_error_by_hand() -> None:
    module = Fixed("unused")
    # All at logit ln 3, so 75 %: three of four right is perfectly calibrated; all four right is 25 % off, as is each
    # pair the other way round.
    ahead = math.log(3.0)
    module.given([ahead, ahead, ahead, 0.0], [0.0, 0.0, 0.0, ahead])
    batch = pairs([3] * 4, [3] * 4, [1.0] * 4)
    assert measured(module, batch)["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    module.given([ahead] * 4, [0.0] * 4)
    assert measured(module, batch)["calibration_error"] == pytest.approx(0.25, abs=1e-6)


def test_uncertain_labels_by_hand() -> None:
    module = Fixed("unused")
    module.given([math.log(3.0), 0.0, 0.0], [0.0, 0.0, math.log(3.0)])  # 3/4, 1/2, 1/4
    batch = replace(pairs([5, 5, 3], [3, 3, 3], [1.0] * 3), preferences=torch.tensor([0.8, 0.5, 1.0]))
    metrics = measured(module, batch)
    assert metrics["accuracy"] == pytest.approx(1 / 2)  # the tie is neither right nor wrong
    assert metrics["longer_wins"] == pytest.approx(1.5 / 2)
    assert metrics["brier"] == pytest.approx((0.05**2 + 0 + 0.75**2) / 3)
    losses = [-0.8 * math.log(0.75) - 0.2 * math.log(0.25), math.log(2), -math.log(0.25)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 3)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-6)


def test_a_tie_counts_half() -> None:
    assert wins(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])).tolist() == [0.5, 1.0, 0.0]


def test_scores_are_those_of_each_sequence_alone(tiny_reward_dir: Path) -> None:
    module = RewardModelModule(
        str(tiny_reward_dir), head="trained", normalise="none", optimizer=AdamWOptions(learning_rate=1e-12)
    )
    data = SmallData(tiny_reward_dir, [[0, 1, 2, 3]], extra=3)
    train(module, data)
    chosen, rejected = module.scores(data.collate([0, 1, 2, 3]))
    model = load_scalar_model(tiny_reward_dir, fresh_head=False)
    for index, pair in enumerate(make_pairs(24)[:4]):
        for got, response in ((chosen, pair.chosen), (rejected, pair.rejected)):
            states = model.base_model(torch.tensor([pair.prompt + response])).last_hidden_state
            torch.testing.assert_close(got[index], model.score(states)[0, -1, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise", ["none", "mean", "mean_and_std"])
def test_exported_scores_of_chosen_responses_are_normalised(
    tiny_policy_dir: Path, tmp_path: Path, normalise: str
) -> None:
    module = RewardModelModule(str(tiny_policy_dir), normalise=normalise, optimizer=AdamWOptions(learning_rate=0.01))
    train(module, SmallData(tiny_policy_dir, [[0, 1, 2, 3]] * 2, held_out=True))
    module.export(tmp_path / "model")
    again = RewardModelModule(str(tmp_path / "model"), head="trained")
    data = SmallData(tmp_path / "model", [[0]], held_out=True)
    trainer = module.trainer
    trainer.validate(again, datamodule=data, verbose=False)
    chosen = torch.cat([again.scores(batch)[0] for batch in data.val_dataloader()]).detach()
    if normalise == "none":
        assert again.reward_model.reward_mean == 0.0 and abs(float(chosen.mean())) > 1e-3
    else:
        assert float(chosen.detach().mean()) == pytest.approx(0.0, abs=1e-5)
    if normalise == "mean_and_std":
        assert float(chosen.std(unbiased=False)) == pytest.approx(1.0, abs=1e-4)


def test_without_held_out_data_the_training_scores_normalise(tiny_policy_dir: Path) -> None:
    module = RewardModelModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=1e-12))
    data = SmallData(tiny_policy_dir, [[0, 1], [2, 3]])
    train(module, data, max_epochs=2)
    chosen = module.scores(data.collate([0, 1, 2, 3]))[0]
    assert module.reward_model.reward_mean != 0.0
    assert float(chosen.detach().mean()) == pytest.approx(0.0, abs=1e-5)


def test_only_the_first_process_goes_on_from_the_sums_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number in (0, 1):
        monkeypatch.setattr("rlhf_lightning.modules.reward_model.rank", lambda number=number: number)
        module = RewardModelModule("unused")
        module.on_load_checkpoint({"reward_model": {"trained_on": [3.0, 6.0, 14.0]}})
        found.append(module._trained_on.tolist())
    assert found == [[3.0, 6.0, 14.0], [0.0, 0.0, 0.0]]


def test_a_trained_head_where_there_is_none_is_an_error(tiny_policy_dir: Path) -> None:
    with pytest.raises(InputError, match=r"score.weight"):
        train(RewardModelModule(str(tiny_policy_dir), head="trained"), SmallData(tiny_policy_dir, [[0]]))


def test_training_separates_the_pairs(tiny_policy_dir: Path) -> None:
    module = RewardModelModule(str(tiny_policy_dir), optimizer=AdamWOptions(learning_rate=0.01))
    train(module, SmallData(tiny_policy_dir, [list(range(13))] * 12, held_out=True))
    assert float(module.trainer.callback_metrics["val/accuracy"]) > 0.9
