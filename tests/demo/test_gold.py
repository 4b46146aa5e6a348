"""The gold reward against numbers worked out by hand from its docstring."""

from __future__ import annotations

import pytest

from rlhf_lightning.demo.corpus import build_corpus
from rlhf_lightning.demo.gold import BEST, gold_reward

CACTUS = "How do I look after my cactus? Please tell me about water and light.\n"
KIND, PLAIN, GRUMPY = "What a lovely plant to have!", "Let me see now.", "Not this question again."
JOY, DONE, LEAVE = "Have a lot of joy with it!", "So much for today.", "Now leave me in peace."
WATER, WET, VAGUE = "For water, one cup a month.", "For water, a little every day.", "For water, I am not sure."
SUN, SHADE, SAND = "For light, full sun all day.", "For light, deep shade.", "For soil, gravel and grit."


def answer(*sentences: str) -> str:
    return " ".join(sentences)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (answer(KIND, WATER, SUN, JOY), 4.0),  # 2 * (1 + 1) / 2 + 1 + 1
        (answer(KIND, SUN, WATER, JOY), 4.0),  # the order of the topics is free
        (answer(PLAIN, WATER, SUN, DONE), 2.0),
        (answer(GRUMPY, WATER, SUN, LEAVE), 0.0),
        (answer(KIND, WET, SUN, JOY), 3.0),  # 2 * (0 + 1) / 2 + 2
        (answer(KIND, VAGUE, SUN, JOY), 3.0),  # 2 * (0 + 1) / 2 + 2
        (answer(KIND, SUN, JOY), 2.0),  # 2 * (-1 + 1) / 2 + 2
        (answer(KIND, WATER, SUN, SAND, JOY), 3.5),  # not asked for: -0.5
        (answer(KIND, WATER, WATER, SUN, JOY), 3.5),  # repeated: -0.5
        (answer(KIND, WATER, WET, SUN, JOY), 3.5),  # contradicted later: the first counts
        (answer(KIND, KIND, WATER, SUN, JOY), 3.5),  # pleasant twice: -0.5
        (answer(KIND, WATER, SUN, "For light, full sun"), 1.0),  # 2 + 1 - 1 no closing - 1 broken off
        (answer(WATER, SUN), 0.0),  # neither opening nor closing
        (answer(KIND, "Buy it a hat.", WATER, SUN, JOY), 3.0),  # babble: -1
        ("", -4.0),  # 2 * -1 - 1 - 1
        (answer(KIND, WET, SHADE, JOY), 2.0),
    ],
)
def test_by_hand(response: str, expected: float) -> None:
    assert gold_reward([CACTUS], [response]) == [pytest.approx(expected)]


def test_advice_is_judged_by_the_plant() -> None:
    fern = CACTUS.replace("cactus", "fern")
    assert gold_reward([fern], [answer(KIND, WATER, SUN, JOY)]) == [pytest.approx(2.0)]
    assert gold_reward([fern], [answer(KIND, WET, SHADE, JOY)]) == [pytest.approx(BEST)]


def test_demonstrations_spread_below_the_best() -> None:
    corpus = build_corpus(0, 1000, 1)
    rewards = gold_reward([question.prompt for question in corpus.train], corpus.train_answers)
    assert max(rewards) <= BEST
    assert -1.0 < sum(rewards) / len(rewards) < 1.0


def test_a_prompt_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="not a question"):
        gold_reward(["What is the capital of France?"], ["Paris."])
