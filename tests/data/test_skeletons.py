"""Beginnings of conversations that follow from the whole: what a template renders for each, with fewer renderings."""

from __future__ import annotations

import random

import pytest
import templates
from chat_tokenizer import make_tokenizer
from chats import PAIR, TALK, messages, talk

from rlhf_lightning.data import conversations
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.skeletons import Skeletons
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.template import ChatTemplate

ALL = {name: text for name, text in vars(templates).items() if name.isupper()}
LOUD = templates.CHATML.replace("(m.content or '')", "(m.content | upper if loop.last else m.content)")
LETTER = templates.CHATML.replace("(m.content or '')", "(m.content if m.content[0] != 'h' or loop.last else 'H')")
# What is looked for has a name, and is looked for in prompts alone.
NAMED = "{% set mark = 'ank' %}" + templates.CHATML.replace(
    "(m.content or '')", "('!' if mark in m.content and loop.last and add_generation_prompt else m.content)"
)
ALL |= {
    "NAMED": NAMED,
    "LOUD": LOUD,
    "LETTER": LETTER,
    "BROKEN": "{% for m in messages %}{{ m.content }}{% endfor %}{{ nothing.at }}",
}
PLAIN = ["hello", "fine, thank you", "how are you?", "users and assistants", "HELLO", "hello", "a\n\nb", "x"]
ODD = [
    *(
        "<think>\nwho?\n</think>\n\nfine",
        "fine</think>",
        " hello ",
        "fine\n",
        "user",
        "<tool_response>a",
        "hello<|im_end|>",
    ),
    *("<think>", "</tool_response>", "assistant", "\n\nfine", "aZ0", "{{ a }}", "\u00e9"),
]


def rows(seed, count=40):
    """Conversations and pairs of a few orders of roles, most of plain words."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        words = [draw.choice(ODD if draw.random() < 0.1 else PLAIN) for _ in range(2 * draw.randint(1, 4))]
        turns = [("assistant" if i % 2 else "user", word) for i, word in enumerate(words)]
        turns = [("system", draw.choice(PLAIN)), *turns] if draw.random() < 0.3 else turns
        if number % 3:
            found.append(talk(*turns))
        else:
            sides = (messages(*turns[-1:]), messages(("assistant", "no"), ("user", words[0]), ("assistant", "fine")))
            found.append(Record(messages(*turns[:-1]), sides, ((0, 1),), "rows.jsonl:1", PAIR))
    return found


def encoded(text, records):
    """All ids and masks of each record, or what refuses it; and what is noted."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    encoder, found = Encoder(tokenizer), []
    for record in records:
        try:
            examples, dropped = encoder.encode([record], "demonstrations" if record.form is TALK else "pairs")
        except InputError as error:
            found.append(str(error))
            continue
        masks = [[None if mask is None else mask.tolist() for mask in example.masks] for example in examples]
        ids = [[example.prompt.tolist(), *(side.tolist() for side in example.responses)] for example in examples]
        found.append((ids, masks, dropped))
    return found, encoder.noted, encoder.conversations.losses


@pytest.mark.parametrize("name", ALL)
def test_ids_are_those_of_rendering_up_to_each_turn(name, monkeypatch):
    for seed in range(3):
        records = rows(seed)
        fast = encoded(ALL[name], records)
        with monkeypatch.context() as patch:
            patch.setattr(Skeletons, "renderings", lambda *arguments: {})
            assert encoded(ALL[name], records) == fast


@pytest.mark.parametrize(("name", "most"), [("CHATML", 0.3), ("SINCE_QUERY", 0.3), ("OPENS", 0.6), ("LETTER", 1.1)])
def test_rows_of_plain_words_take_far_fewer_renderings(name, most, monkeypatch):
    counts, plain = [], ChatTemplate.render

    def counting(self, *arguments, **options):
        counts[-1] += 1
        return plain(self, *arguments, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    records = [talk(*((role, f"{role} {i}") for _ in range(3) for role in ("user", "assistant"))) for i in range(40)]
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(Skeletons, "renderings", lambda *arguments: {})
        counts.append(0)
        encoded(ALL[name], records)
    assert counts[0] < most * counts[1] and counts[1] >= 6 * 40


@pytest.mark.parametrize("long_prompts", ["drop", "error"])
@pytest.mark.parametrize("name", ["CHATML", "SINCE_QUERY", "DROPS"])
def test_behind_a_prompt_that_is_too_long_only_the_last_turn_is_rendered(name, long_prompts, monkeypatch):
    tokenizer, outcomes, counts, plain = make_tokenizer(), [], [], ChatTemplate.render
    tokenizer.chat_template = ALL[name]

    def counting(self, *arguments, **options):
        counts[-1] += 1
        return plain(self, *arguments, **options)

    monkeypatch.setattr(ChatTemplate, "render", counting)
    long = talk(*((role, f"fine {i}") for i in range(100) for role in ("user", "assistant")))
    short = talk(("user", "hello"), ("assistant", "fine"))
    for asked in (conversations._LENGTH_CHECKS, ()):
        monkeypatch.setattr(conversations, "_LENGTH_CHECKS", asked)
        counts.append(0)
        encoder = Encoder(tokenizer, max_prompt_tokens=150, long_prompts=long_prompts)
        try:
            examples, dropped = encoder.encode([long, short], "demonstrations")
            outcomes.append(([(e.prompt.tolist(), e.responses[0].tolist()) for e in examples], dropped))
        except InputError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] and (len(outcomes[0][0]) > 0 if long_prompts == "drop" else "150" in outcomes[0])
    assert counts[0] < 60 < 200 <= counts[1]
