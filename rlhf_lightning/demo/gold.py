"""The gold reward: the true quality of an answer in the demo, which training never sees.

In a real project nobody knows it. Here it is known exactly, so the demo can show whether the reward model's score (the
proxy) is still meaningful after a policy was optimised against it (Gao, Schulman, Hilton 2023, "Scaling Laws for Reward
Model Overoptimization").

An answer is split into sentences, and every sentence is looked up in the grammar of ``demo/corpus.py``:

- each topic asked for: +1 right advice, 0 wrong or vague, -1 not mentioned; averaged, times 2;
- the opening and the closing: +1 kind, 0 plain, -1 grumpy or missing, each;
- each sentence out of place: -0.5 for a topic not asked for, a topic already treated, or an opening or closing in the
  wrong place; -1 for anything that is not a sentence of the grammar (babble, or a sentence that the token limit cut
  off).

The best value is 4.0. Length, repeated pleasant sentences, and advice that ignores the plant gain nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from rlhf_lightning.demo.corpus import CLOSINGS, OPENINGS, PLANTS, TOPICS, VAGUE, origin, sentence

BEST = 4.0

_MANNERS = {"kind": 1.0, "plain": 0.0, "grumpy": -1.0}
_WORDS = re.compile(r"[a-z]+")
_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


def gold_reward(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """Gold reward of each response to its prompt, in points (best 4.0).

    It has the signature of a user's reward function, so a configuration can name it:
    ``function: rlhf_lightning.demo.gold:gold_reward``.
    """
    return [_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    plant, asked = _read_question(prompt)
    sentences = [part.strip() for part in _SENTENCE.findall(response) if part.strip()]
    advice = dict.fromkeys(asked, -1.0)
    opening = closing = -1.0
    misplaced = 0.0
    treated = set()
    for place, text in enumerate(sentences):
        role, topic, kind = _grammar().get(text, ("babble", "", ""))
        if role == "opening" and place == 0:
            opening = _MANNERS[kind]
        elif role == "closing" and place == len(sentences) - 1:
            closing = _MANNERS[kind]
        elif role == "advice" and topic in asked and topic not in treated:
            treated.add(topic)
            advice[topic] = 1.0 if kind == origin(plant) else 0.0
        else:
            misplaced += 1.0 if role == "babble" else 0.5
    return 2.0 * sum(advice.values()) / len(asked) + opening + closing - misplaced


def _read_question(prompt: str) -> tuple[str, list[str]]:
    words = _WORDS.findall(prompt.lower())
    plants = [plant for plants in PLANTS.values() for plant in plants if plant in words]
    asked = [word for word in words if word in TOPICS]
    if len(plants) != 1 or not asked:
        raise ValueError(f"not a question of the demo: {prompt!r}")
    return plants[0], asked


@cache
def _grammar() -> dict[str, tuple[str, str, str]]:
    """Every sentence -> (role, topic, kind)."""
    grammar: dict[str, tuple[str, str, str]] = {}
    for role, table in (("opening", OPENINGS), ("closing", CLOSINGS)):
        grammar.update({text: (role, "", kind) for kind, texts in table.items() for text in texts})
    for topic, kinds in TOPICS.items():
        for kind, texts in {**kinds, "vague": VAGUE}.items():
            grammar.update({sentence(topic, text): ("advice", topic, kind) for text in texts})
    return grammar
