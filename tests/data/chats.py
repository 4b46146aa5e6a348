"""Chats as records, and what an encoder makes of them: shared by the tests of conversations."""

from __future__ import annotations

from chat_tokenizer import make_tokenizer

from rlhf_lightning.data import forms
from rlhf_lightning.data.rows import Form, Record
from rlhf_lightning.data.tokenization import Encoder, Example
from rlhf_lightning.data.values import Message

TALK, PAIR, DEMONSTRATION, PROMPT = forms.Chat(), forms.Pair(), forms.DEMONSTRATION, forms.PromptAlone()

TOOL = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def messages(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(*turn) for turn in turns)


def talk(*turns: tuple[str, str], form: Form = TALK, **more) -> Record:
    return Record(messages(*turns[:-1]), (turns[-1][1],), (), "rows.jsonl:1", form, **more)


def encode(tokenizer, record, kind="demonstrations", template=None, **options) -> list[Example]:
    if template is not None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
    return Encoder(tokenizer, **options).encode([record], kind)[0]


def ids(example: Example, side: int = 0) -> list[int]:
    return [*example.prompt.tolist(), *example.responses[side].tolist()]


def learnt(tokenizer, example: Example, side: int = 0) -> list[str]:
    """The texts of the runs of tokens that carry loss."""
    mask = example.masks[side].tolist() if example.masks and example.masks[side] is not None else None
    runs: list[list[int]] = []
    before = False
    for place, token in enumerate(example.responses[side].tolist()):
        now = mask is None or mask[place]
        if now:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = now
    return [tokenizer.decode(run) for run in runs]


def rendered(tokenizer, template, turns, **options) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], chat_template=template, tokenize=False, **options
    )
    return tokenizer(text, add_special_tokens=False).input_ids


FOUR = [("user", "hello"), ("assistant", "fine, thank you"), ("user", "how are you?"), ("assistant", "fine")]


def noted(template: str, *records: Record) -> dict[str, int]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer)
    encoder.encode(records, "demonstrations")
    return dict(encoder.noted)
