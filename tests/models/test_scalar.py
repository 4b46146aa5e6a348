from pathlib import Path

import pytest
import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.scalar import ScalarModel


@pytest.fixture
def scalar(tiny_reward_dir: Path) -> ScalarModel:
    return ScalarModel(load_scalar_model(tiny_reward_dir, fresh_head=False, dtype=torch.float64))


LENGTHS = torch.tensor([7, 3, 5])


def test_every_position_equals_the_stock_score_of_the_prefix(scalar: ScalarModel) -> None:
    tokens = torch.randint(4, 57, (3, 7))
    ours = scalar(tokens, LENGTHS)
    for row in range(3):
        for end in range(1, int(LENGTHS[row]) + 1):
            stock = scalar.model(input_ids=tokens[row : row + 1, :end]).logits[0, 0]
            torch.testing.assert_close(ours[row, end - 1], stock)
        assert torch.equal(ours[row, LENGTHS[row] :], torch.zeros(7 - int(LENGTHS[row]), dtype=torch.float64))


def test_padding_changes_nothing_even_where_pad_is_eos(scalar: ScalarModel) -> None:
    tokens = torch.randint(4, 57, (3, 7))
    tokens[torch.arange(3), LENGTHS - 1] = 1  # every row ends in EOS
    scores = at_last_token(scalar(tokens, LENGTHS), LENGTHS)
    padded = torch.full((3, 12), 1)
    padded[:, :7] = torch.where(torch.arange(7) < LENGTHS[:, None], tokens, 1)
    torch.testing.assert_close(at_last_token(scalar(padded, LENGTHS), LENGTHS), scores)


def test_normalisation_by_hand(scalar: ScalarModel) -> None:
    tokens = torch.randint(4, 57, (3, 7))
    raw = scalar(tokens, LENGTHS)
    scalar.set_normalisation(0.5, 4.0)
    normal = scalar(tokens, LENGTHS)
    torch.testing.assert_close(normal[0], (raw[0] - 0.5) / 4.0)
    assert normal[1, 3:].abs().max() == 0
    assert torch.equal(scalar(tokens, LENGTHS, normalise=False), raw)
    assert (scalar.model.config.reward_mean, scalar.model.config.reward_std) == (0.5, 4.0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_normalisations_that_cannot_be(scalar: ScalarModel, mean: float, std: float) -> None:
    with pytest.raises(InputError, match="cannot be normalised"):
        scalar.set_normalisation(mean, std)


def test_scores_stay_float32_under_autocast_and_in_bfloat16(scalar: ScalarModel) -> None:
    tokens = torch.randint(4, 57, (3, 7))
    exact = scalar(tokens, LENGTHS)
    scalar.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = scalar(tokens, LENGTHS)
    assert scores.dtype == torch.float32 and (scores - exact).abs().max() < 0.3
    assert scalar.bfloat16()(tokens, LENGTHS).dtype == torch.float32
