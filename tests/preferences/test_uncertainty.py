"""The order of items by disagreement: by hand, its invariances, and the scores it is made of against stock models."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.uncertainty import by_disagreement, disagreement, reward_scores, uncertain_order

NAN, LOG3 = math.nan, math.log(3)  # sigmoid(LOG3) is 3/4


@dataclass(frozen=True)
class Item:
    """What `annotate` orders."""

    prompt: str | list[dict[str, Any]]
    completions: tuple[str, ...]


ITEMS = [
    Item("the cat", ("is good", "is bad .", "sees a fish")),
    Item("hello", ("bye", "")),
    Item([{"role": "user", "content": "who sees the bird"}], ("the dog", "no")),
    Item("why not", ("yes .", "the cat sees the big old red dog", "no")),
]


def test_disagreement_by_hand() -> None:
    """Deviations of 1/2 and 3/4: 1/8. Of 3/4 and 1/4: 1/4. An item's value is the mean over its pairs."""
    one = [[0, 0, NAN], [0, 0, 0], [1, NAN, NAN], [0, 5, NAN], [LOG3, 0, NAN], [7, 7, NAN]]
    two = [[LOG3, 0, NAN], [LOG3, 0, 0], [9, NAN, NAN], [0, 5, NAN], [0, LOG3, NAN], [2 + LOG3, 2, NAN]]
    scores = torch.tensor([one, two])
    expected = [1 / 8, (1 / 8 + 1 / 8 + 0) / 3, NAN, 0, 1 / 4, 1 / 8]
    assert disagreement(scores).tolist() == pytest.approx(expected, nan_ok=True, abs=1e-7)
    assert by_disagreement(scores) == [4, 0, 5, 1, 3, 2]


def test_neither_shifts_of_a_model_nor_the_order_of_answers_matter() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 50, 4, dtype=torch.float64)
    shifted = scores + torch.randn(3, 50, 1, dtype=torch.float64)
    torch.testing.assert_close(disagreement(shifted), disagreement(scores))
    torch.testing.assert_close(disagreement(scores[:, :, [2, 0, 3, 1]]), disagreement(scores))
    assert disagreement(scores[:1]).abs().max() == 0  # one model agrees with itself


def saved(folder: Path, to: Path, seed: int, **config: float) -> Path:
    """The tiny reward model with another head, and with a normalisation in its config."""
    shutil.copytree(folder, to)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(to)
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(values | config))
    return to


def stock_score(folder: Path, prompt: str, response: str) -> float:
    """The score by transformers, of one unpadded row that ends in EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = [*tokenizer(prompt)["input_ids"], *tokenizer(response, add_special_tokens=False)["input_ids"], 1]
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits)


def test_scores_are_the_stock_models_and_no_normalisation_changes_them(tiny_reward_dir: Path, tmp_path: Path) -> None:
    folder = saved(tiny_reward_dir, tmp_path / "a", 1, reward_mean=3.0, reward_std=7.0)
    scores = reward_scores(ITEMS, folder)
    assert scores.shape == (4, 3)
    chat = "user : who sees the bird assistant : "
    expected = [
        [stock_score(folder, "the cat", text) for text in ITEMS[0].completions],
        [stock_score(folder, "hello", "bye"), NAN, NAN],  # training drops the empty answer
        [*(stock_score(folder, chat, text) for text in ITEMS[2].completions), NAN],
        [stock_score(folder, "why not", text) for text in ITEMS[3].completions],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward_scores(ITEMS, folder, batch_tokens=8), scores, equal_nan=True)


def test_the_order_is_that_of_the_models_scores(tiny_reward_dir: Path, tmp_path: Path) -> None:
    folders = [saved(tiny_reward_dir, tmp_path / str(seed), seed, reward_std=1.0 + 4 * seed) for seed in range(2)]
    found = []
    for item in ITEMS:
        texts = [text for text in item.completions if text]
        prompt = item.prompt if isinstance(item.prompt, str) else "user : who sees the bird assistant : "
        scores = [[stock_score(folder, prompt, text) for text in texts] for folder in folders]
        chances = [
            [1 / (1 + math.exp(own[j] - own[i])) for own in scores]
            for i in range(len(texts))
            for j in range(i + 1, len(texts))
        ]
        found.append(sum(abs(a - b) / 2 for a, b in chances) / len(chances) if chances else -1.0)
    assert uncertain_order(ITEMS, folders) == sorted(range(len(ITEMS)), key=lambda place: -found[place])


def test_models_that_cannot_disagree_are_refused(tiny_reward_dir: Path, tiny_policy_dir: Path, tmp_path: Path) -> None:
    for folders in ([tiny_reward_dir], [tiny_reward_dir, tiny_reward_dir / "."]):
        with pytest.raises(InputError, match="two or more different reward models"):
            uncertain_order(ITEMS, folders)
    with pytest.raises(InputError, match="no trained reward head"):
        uncertain_order(ITEMS, [tiny_reward_dir, tiny_policy_dir])
    with pytest.raises(InputError, match="no such folder"):
        uncertain_order(ITEMS, [tiny_reward_dir, tmp_path / "none"])
