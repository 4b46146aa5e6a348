"""The demo's world: questions about pot plants, and answers by gardeners of mixed skill and mixed manners.

A question names a plant and two or three topics ("light", "water", ...). An answer has an opening, sentences of advice
on topics, and a closing. The right advice depends on the plant, so pleasant words alone make no good answer: a policy
must read the question. The demonstrations are written by gardeners who are right about half the time, forget topics,
digress, and are kind, plain or grumpy. A model that imitates them does the same, and preference training must correct
it. ``demo/gold.py`` scores answers.

Everything is a pure function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from random import Random

PLANTS: dict[str, tuple[str, ...]] = {
    "desert": ("cactus", "aloe", "agave", "yucca"),
    "forest": ("fern", "orchid", "begonia", "ivy"),
    "garden": ("rose", "mint", "peony", "sage"),
}
"""The plants by their origin, which decides what is right for them."""

TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "light": {
        "desert": ("full sun all day", "your sunniest window"),
        "forest": ("deep shade", "the darkest corner you have"),
        "garden": ("morning sun alone", "a bright place behind a curtain"),
    },
    "water": {
        "desert": ("one cup a month", "wait until the pot is dry"),
        "forest": ("a little every day", "never let the pot dry out"),
        "garden": ("one cup a week", "a good drink every Sunday"),
    },
    "soil": {
        "desert": ("half of it sand", "gravel and grit"),
        "forest": ("loose bark", "moss and bits of wood"),
        "garden": ("dark compost", "earth with old manure"),
    },
    "food": {
        "desert": ("none at all", "nothing, it would only burn"),
        "forest": ("one spoon in April", "once when spring comes"),
        "garden": ("every second week", "plenty, it is hungry"),
    },
    "winter": {
        "desert": ("a cool room", "the cold hall is right"),
        "forest": ("a place near the stove", "keep it warm"),
        "garden": ("leave it in the garden", "snow will not harm it"),
    },
    "pruning": {
        "desert": ("put the scissors away", "no cut at all"),
        "forest": ("take off the dry tips in March", "pinch it gently"),
        "garden": ("cut it to the ground", "be hard on it each autumn"),
    },
}
"""Topic -> origin of the plants that the advice is right for -> the ways to phrase it."""

VAGUE: tuple[str, ...] = ("I am not sure", "nobody can say much")
"""Ways to mention a topic without advice."""

OPENINGS: dict[str, tuple[str, ...]] = {
    "kind": ("What a lovely plant to have!", "I am so glad you ask!", "With pleasure, my friend!"),
    "plain": ("Here is what I know.", "Let me see now.", "A few words on this plant."),
    "grumpy": ("Not this question again.", "You should have read a book.", "I have no time for this."),
}
CLOSINGS: dict[str, tuple[str, ...]] = {
    "kind": ("Have a lot of joy with it!", "Come back whenever you like!", "You will do very well!"),
    "plain": ("That is all there is.", "So much for today.", "This is how I do it."),
    "grumpy": ("It will die anyway.", "Now leave me in peace.", "You will get it wrong."),
}

QUESTIONS: tuple[str, ...] = (
    "How do I look after my {plant}? Please tell me about {topics}.\n",
    "My aunt gave me {article} {plant}. What should I know about {topics}?\n",
    "I want to keep {article} {plant} at home. I have questions on {topics}.\n",
    "There is {article} {plant} in my new flat. Can you help me with {topics}?\n",
)


@dataclass(frozen=True)
class Question:
    """A question: its plant and topics, and the prompt."""

    plant: str
    topics: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class Corpus:
    """Questions in two disjoint parts, each with one gardener's answer to every question."""

    train: list[Question]
    train_answers: list[str]
    held_out: list[Question]
    held_out_answers: list[str]


def sentence(topic: str, advice: str) -> str:
    """The sentence with a piece of advice on a topic."""
    return f"For {topic}, {advice}."


def origin(plant: str) -> str:
    """The origin of ``plant``, which decides what advice is right for it."""
    return next(place for place, plants in PLANTS.items() if plant in plants)


def all_questions() -> list[Question]:
    """All 7,200 questions in a fixed order: plants x ordered choices of two or three topics x phrasings."""
    questions = []
    for plant in (plant for plants in PLANTS.values() for plant in plants):
        for count in (2, 3):
            for topics in permutations(TOPICS, count):
                words = {
                    "plant": plant,
                    "article": "an" if plant[0] in "aeiou" else "a",
                    "topics": ", ".join(topics[:-1]) + " and " + topics[-1],
                }
                questions += [Question(plant, topics, phrasing.format(**words)) for phrasing in QUESTIONS]
    return questions


def build_corpus(seed: int, train: int, held_out: int) -> Corpus:
    """Draws ``train`` and ``held_out`` questions without replacement, with one answer each."""
    random = Random(f"corpus {seed}")
    questions = random.sample(all_questions(), train + held_out)
    answers = [write_answer(question, random) for question in questions]
    return Corpus(questions[:train], answers[:train], questions[train:], answers[train:])


def write_answer(question: Question, random: Random) -> str:
    """One gardener's answer. Gardeners differ in skill, and the less they know, the grumpier they are."""
    skill = random.uniform(0.2, 1.0)
    moods = ("kind", "plain") if random.random() < skill else ("plain", "grumpy")
    topics = [topic for topic in question.topics if random.random() < 0.4 + 0.6 * skill]
    if random.random() < 0.2:  # a digression, or the same topic twice
        topics.insert(random.randint(0, len(topics)), random.choice(list(TOPICS)))
    sentences = [random.choice(OPENINGS[random.choice(moods)])]
    sentences += [_advice(question.plant, topic, skill, random) for topic in topics]
    if random.random() < 0.9:
        sentences.append(random.choice(CLOSINGS[random.choice(moods)]))
    return " ".join(sentences)


def _advice(plant: str, topic: str, skill: float, random: Random) -> str:
    right = origin(plant)
    if random.random() < skill:
        return sentence(topic, random.choice(TOPICS[topic][right]))
    if random.random() < 0.3:
        return sentence(topic, random.choice(VAGUE))
    wrong = random.choice([place for place in PLANTS if place != right])
    return sentence(topic, random.choice(TOPICS[topic][wrong]))
