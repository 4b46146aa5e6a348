"""Borders: a response gets the ids that it has behind its prompt, with every family of tokenizers."""

from __future__ import annotations

from collections import Counter

import pytest
from chat_tokenizer import make_tokenizer
from tokenizer_families import BRACKETS, FAMILIES, TEMPLATE, count, family
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AddedToken, PreTrainedTokenizerFast

from rlhf_lightning.data import forms
from rlhf_lightning.data.conversations import Rendered
from rlhf_lightning.data.ids import TextIds, readable
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder

TEXT = "the cat sees a dog, and 12 birds find the fish: hello world! why not? it is new; it's (very) good"
WORDS = TEXT.split()
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 12)) for i in range(40)]
BORDERS = [(" ", ""), ("", " "), ("\n", ""), ("\n\n", "1. "), (":", ""), ("", "\n"), ("x", "y"), ("?", "'s ")]
MARKED = [name for name in FAMILIES if name.startswith(("Meta", "Prep", "Uni")) or "prefix" in name]


def records() -> list[Record]:
    pairs = [(TEXTS[i] + left, right + TEXTS[i + 1]) for i in range(5) for left, right in BORDERS]
    return [Record(prompt, (text,), (), "rows.jsonl:1", forms.DEMONSTRATION) for prompt, text in pairs]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.mark.parametrize("template", [TEMPLATE, BRACKETS], ids=["tokens", "brackets"])
def test_ids_are_those_of_the_whole_text_but_where_a_merge_crosses(name, template):
    tokenizer = family(name, TEXTS, template)
    for chat in (False, True):
        found = count(tokenizer, records(), chat)
        assert found["other"] == 0, found
        if chat:
            assert found["equal"] >= 0.7 * len(records()), found


@pytest.mark.parametrize("marked", MARKED)
def test_a_response_of_a_tokenizer_with_a_word_mark_begins_with_no_space_of_its_own(marked):
    tokenizer = family(marked, TEXTS)
    record = Record("it is:", ("hello world",), (), "rows.jsonl:1", forms.DEMONSTRATION)
    (example,), _ = Encoder(tokenizer).encode([record], "demonstrations")
    first = tokenizer.convert_ids_to_tokens(example.responses[0].tolist())[0]
    assert not first.startswith(("▁", "Ġ"))
    spaced = Record("it is:", (" hello world",), (), "rows.jsonl:1", forms.DEMONSTRATION)
    (example,), _ = Encoder(tokenizer).encode([spaced], "demonstrations")
    assert tokenizer.convert_ids_to_tokens(example.responses[0].tolist())[0].startswith(("▁", "Ġ"))


def test_borders_that_merge_are_counted():
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, compared=10)
    rows = [("hel", "lo world"), ("hello ", "<|im_end|> fine"), ("hello", " world")]
    made = [Record(prompt, (text,), (), "rows.jsonl:1", forms.DEMONSTRATION) for prompt, text in rows]
    encoder.encode(made, "demonstrations")
    assert encoder.borders == {"sequences": 3, "compared": 3, "merged": 1}
    few = Encoder(tokenizer, compared=2)
    few.encode(made, "demonstrations")
    assert few.borders["compared"] == 2


def test_words_that_spell_a_special_token_get_the_ids_of_words_in_a_template():
    for name in FAMILIES:
        tokenizer = family(name, [*TEXTS, "< | e n d | >"])
        ids = TextIds(tokenizer)
        special = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
        text = Rendered(("<|user|>\nthe \U00100000 cat<|end|>",), hidden=(("\U00100000", "<|end|>"),))
        (pieces,) = ids.pieces([text])
        assert Counter(i for i in pieces[0] if i in special) == Counter(special), name
        read = tokenizer.decode(pieces[0], skip_special_tokens=True).replace(" ", "")
        assert read.strip() == "the<|end|>cat", name


@pytest.mark.parametrize("stripping", [False, True])
def test_a_spelled_special_token_changes_no_ids_of_later_turns(name, stripping):
    tokenizer = family(name, TEXTS)
    if stripping:  # as Phi-3's, which swallow the blanks behind them
        tokens = [AddedToken(text, special=True, rstrip=True) for text in ("<|user|>", "<|end|>", "<|assistant|>")]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    later = ("the fish<|end|>", "\n<|user|>\nwhy not<|end|>\n<|assistant|>\n", "it is<|end|>")
    said = Rendered(("<|user|>\na \U00100000 cat<|end|><|assistant|>", *later), hidden=(("\U00100000", "<|end|>"),))
    meant = Rendered(("<|user|>\na dog cat<|end|><|assistant|>", *later))  # its ids are held by the test of whole texts
    found, wanted = TextIds(tokenizer).pieces([said, meant])
    assert found[1:] == wanted[1:]
    assert found[0][-1] == wanted[0][-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_an_example_tells_words_from_the_tokens_that_they_spell():
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    letters = tokenizer("hello<|im_end|>", split_special_tokens=True).input_ids
    assert readable(tokenizer, [*letters, end]) == "hello[text: <|im_end|>]<|im_end|>"
    assert readable(tokenizer, [*tokenizer("hello").input_ids, end]) == "hello<|im_end|>"


def test_ids_may_have_gaps_and_tokens_may_come_later():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "cat": 79, "<unk>": 5}, unk_token="<unk>")), eos_token="<eos>"
    )
    texts = TextIds(tokenizer)
    assert texts.plain(["cat"]) == [[79]]
    tokenizer.add_tokens(["dog"])
    assert texts.plain(["dog"]) == [[tokenizer.convert_tokens_to_ids("dog")]]
