"""Chats: prompt and response are what the template renders for the whole, and only the answers carry loss."""

from __future__ import annotations

import json

import pytest
import templates
from chat_tokenizer import make_tokenizer
from chats import DEMONSTRATION, FOUR, PAIR, PROMPT, encode, ids, learnt, messages, noted, rendered, talk

from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError


@pytest.mark.parametrize("template", [templates.CHATML, "\ufeff" + templates.CHATML, templates.BRACKETS])
def test_whole_is_what_the_template_renders(tokenizer, template):
    (example,) = encode(tokenizer, talk(*FOUR), template=template)
    whole = rendered(tokenizer, template, FOUR)
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    assert ids(example) == whole[:end]
    assert example.prompt.tolist() == rendered(tokenizer, template, FOUR[:1], add_generation_prompt=True)


def test_every_turn_of_the_assistants_carries_loss_and_no_other_token(tokenizer):
    (example,) = encode(tokenizer, talk(*FOUR))
    # The oracle: pieces tokenised one by one.
    pieces = [
        ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("fine, thank you<|im_end|>", True),
        ("\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n", False),
        ("fine<|im_end|>", True),
    ]
    expected = [(id, said) for text, said in pieces for id in tokenizer(text, add_special_tokens=False).input_ids]
    assert ids(example) == [id for id, _ in expected]
    (mask,) = example.masks
    assert [False] * len(example.prompt) + mask.tolist() == [said for _, said in expected]
    (last,) = encode(tokenizer, talk(*FOUR), train_on="last_assistant")
    assert ids(last) == ids(example) and last.masks == () and learnt(tokenizer, last) == ["fine<|im_end|>"]
    (given,) = encode(tokenizer, talk(*FOUR, form=DEMONSTRATION))  # a prompt of messages teaches nothing
    assert learnt(tokenizer, given) == ["fine<|im_end|>"]


def test_turns_that_the_template_changes_are_sequences_of_their_own(tokenizer):
    turns = [
        ("user", "hello"),
        ("assistant", "<think>\nwho?\n</think>\n\nfine"),
        ("user", "you?"),
        ("assistant", "<think>\nme\n</think>\n\nfine, thank you"),
    ]
    tokenizer_of = make_tokenizer()
    tokenizer_of.chat_template = templates.DROPS
    encoder = Encoder(tokenizer_of, compared=10)
    examples, _ = encoder.encode([talk(*turns)], "demonstrations")
    assert [learnt(tokenizer, example) for example in examples] == [
        ["<think>\nwho?\n</think>\n\nfine<|im_end|>"],
        ["<think>\nme\n</think>\n\nfine, thank you<|im_end|>"],
    ]
    for example, count in zip(examples, (2, 4), strict=True):
        whole = rendered(tokenizer, templates.DROPS, turns[:count])
        assert ids(example) == whole[: len(ids(example))] and tokenizer.decode(whole[len(ids(example)) :]) == "\n"
        asked = rendered(tokenizer, templates.DROPS, turns[: count - 1], add_generation_prompt=True)
        assert example.prompt.tolist() == asked
    assert "who?" not in tokenizer.decode(ids(examples[1]))
    assert encoder.noted["conversation split into one sequence a turn, as the chat template changes earlier turns"] == 1
    assert encoder.borders == {"sequences": 2, "compared": 2}


def test_an_opening_that_the_generation_prompt_has_is_taken_once(tokenizer):
    tokenizer_of = make_tokenizer()
    tokenizer_of.chat_template = templates.OPENS
    turns = [("user", "hello"), ("assistant", "<think>\nwho?\n</think>\n\nfine")]
    encoder = Encoder(tokenizer_of)
    (example,), _ = encoder.encode([talk(*turns)], "demonstrations")
    assert tokenizer.decode(example.prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert learnt(tokenizer, example) == ["who?\n</think>\n\nfine<|im_end|>"]
    assert list(encoder.noted.values()) == [1] and "taken once" in next(iter(encoder.noted))
    # Without one the rendered conversation wins over the generation prompt, and that is noted.
    (example,), _ = encoder.encode([talk(("user", "hello"), ("assistant", "fine"))], "demonstrations")
    assert tokenizer.decode(ids(example)) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>"
    opening = json.dumps("<think>\n")
    assert any(
        "begins without its generation prompt" in w and f"without the {opening} that sampling" in w
        for w in encoder.noted
    )
    # So does it over the rest of an opening, which is what a policy says behind the generation prompt.
    (example,), _ = encoder.encode([talk(("user", "hello"), ("assistant", "who?\n</think>\n\nfine"))], "demonstrations")
    assert tokenizer.decode(ids(example)).endswith("<|im_start|>assistant\nwho?\n</think>\n\nfine<|im_end|>")
    assert [count for what, count in encoder.noted.items() if opening in what] == [2]


TAKEN_ONCE = "response that repeats the end of the generation prompt, which is taken once"


@pytest.mark.parametrize("text", ["<think>who?</think>fine", "<think> who? </think>\n\nfine"])
def test_an_opening_with_other_blanks_behind_it_is_taken_once_too(tokenizer, text):
    tokenizer_of = make_tokenizer()
    tokenizer_of.chat_template = templates.OPENS
    encoder = Encoder(tokenizer_of)
    (example,), _ = encoder.encode([talk(("user", "hello"), ("assistant", text))], "demonstrations")
    assert tokenizer.decode(ids(example)).count("<think>") == 1 and learnt(tokenizer, example) == [f"{text}<|im_end|>"]
    assert encoder.noted == {TAKEN_ONCE: 1}


@pytest.mark.parametrize("text", ["assistant", "fine", "\n"])
def test_words_that_the_generation_prompt_happens_to_have_are_not_taken_once(text):
    # As Harmony's: the generation prompt ends in the role, and what the template writes next is a part of the response.
    role_last = templates.CHATML.replace("m.role + '\n'", "m.role + '<s>'").replace("assistant\n'", "assistant'")
    for words in (text, text * 2, f"{text} {text}"):
        assert noted(role_last, talk(("user", "assistant"), ("assistant", words))) == {}
    # Nor are they where the template changes the response.
    loud = role_last.replace("(m.content or '')", "(m.content | upper if m.role == 'assistant' else m.content)")
    changed = {} if not text.strip() else {"response that the chat template changes": 1}
    assert noted(loud, talk(("user", "hello"), ("assistant", text))) == changed
    # Nor are blanks.
    blank = templates.CHATML.replace("assistant\n'", "assistant\n\n'")
    (note,) = noted(blank, talk(("user", "hello"), ("assistant", "fine")))
    assert r'without the "\n" that sampling adds' in note
    # Nor is a beginning of it that stands before the whole response, too.
    spelt = templates.CHATML.replace("assistant\n'", "assistant\n>'").replace("+ '\n' +", "+ '\n' + '>' +")
    assert noted(spelt, talk(("user", "hello"), ("assistant", ">>"))) == {}


def test_empty_earlier_turns_of_the_assistants_are_not_learnt(tokenizer):
    turns = [*FOUR[:1], ("assistant", " "), *FOUR[2:]]
    tokenizer_of = make_tokenizer()
    for template, count in ((templates.CHATML, 1), (templates.DROPS, 1)):
        tokenizer_of.chat_template = template
        encoder = Encoder(tokenizer_of)
        examples, _ = encoder.encode([talk(*turns)], "demonstrations")
        assert len(examples) == count and len(learnt(tokenizer, examples[0])) == 1
        assert encoder.noted == {"empty turn of the assistant's, not learnt": 1}


def test_an_end_that_is_all_the_last_answer_says_is_learnt(tokenizer):
    encoder = Encoder(tokenizer)
    (example,), _ = encoder.encode([talk(*FOUR[:3], ("assistant", "<|im_end|>"))], "demonstrations")
    assert learnt(tokenizer, example) == ["fine, thank you<|im_end|>", "<|im_end|>"]
    assert not any("empty turn" in what for what in encoder.noted)


@pytest.mark.parametrize("template", [templates.CHATML, templates.BRACKETS])
def test_turns_of_the_assistants_that_open_a_conversation_are_not_learnt(tokenizer, template):
    tokenizer_of = make_tokenizer()
    tokenizer_of.chat_template = template
    opening = [("assistant", "hello user"), ("assistant", " "), ("assistant", "hello world")]
    for count in (1, 3):
        encoder = Encoder(tokenizer_of)
        (example,), _ = encoder.encode([talk(*opening[:count], *FOUR)], "demonstrations")
        assert [text.replace(" <|", "<|").strip() for text in learnt(tokenizer, example)] == [
            "fine, thank you<|im_end|>",
            "fine<|im_end|>",
        ]
        whole = rendered(tokenizer, template, [*opening[:count], *FOUR])
        assert ids(example) == whole[: len(ids(example))]
        note = "opening turn of the assistant's, not learnt, as no message asks for it"
        assert encoder.noted[note] == (count + 1) // 2  # the empty one is counted as such
    # A system message asks, as where it says how to greet.
    if template == templates.CHATML:
        (greeting,) = encode(tokenizer, talk(("system", "be kind"), *opening[:1], *FOUR))
        assert learnt(tokenizer, greeting)[0] == "hello user<|im_end|>" and len(learnt(tokenizer, greeting)) == 3
    for prompt in (opening[:1], opening[:2]):
        with pytest.raises(InputError, match=r"rows.jsonl:1: the assistant's turns answer no message; put the user's"):
            encode(tokenizer, talk(*prompt, ("assistant", "fine")), template=template)


def test_begun_answers_go_on(tokenizer):
    prompt = messages(("user", "hello"), ("assistant", "fine, "))
    record = Record(prompt, ("thank you",), (), "rows.jsonl:1", DEMONSTRATION)
    (example,) = encode(tokenizer, record)
    assert tokenizer.decode(example.prompt).endswith("<|im_start|>assistant\nfine, ")
    assert learnt(tokenizer, example) == ["thank you<|im_end|>"]
    (asked,) = encode(tokenizer, record, "prompts")
    assert asked.prompt.tolist() == example.prompt.tolist()


def test_pairs_may_part_before_their_last_turn(tokenizer):
    chosen = messages(("assistant", "fine"), ("user", "and?"), ("assistant", "thank you"))
    rejected = messages(("assistant", "hello"), ("user", "what?"), ("assistant", "fine"))
    record = Record(messages(("user", "how are you?")), (chosen, rejected), ((0, 1),), "rows.jsonl:1", PAIR)
    (example,) = encode(tokenizer, record, "pairs")
    assert learnt(tokenizer, example) == ["fine<|im_end|>", "thank you<|im_end|>"]
    assert learnt(tokenizer, example, 1) == ["hello<|im_end|>", "fine<|im_end|>"]
    whole = [("user", "how are you?"), *((m.role, m.content) for m in rejected)]
    assert ids(example, 1) == rendered(tokenizer, templates.CHATML, whole)[: len(ids(example, 1))]
    changed = encode(tokenizer, record, "pairs", template=templates.DROPS)[0]
    assert learnt(tokenizer, changed) == ["fine<|im_end|>", "<think>\n\n</think>\n\nthank you<|im_end|>"]


def test_pairs_of_equal_tokens_are_dropped_and_counted(tokenizer):
    record = Record(messages(("user", "a")), ("fine ", " fine"), ((0, 1),), "rows.jsonl:1", PAIR)
    other = make_tokenizer()
    other.chat_template = templates.BRACKETS
    assert Encoder(other).encode([record], "pairs") == ([], {"responses of equal tokens": 1})
    assert len(encode(tokenizer, record, "pairs")) == 1


def test_cutting_a_conversation_keeps_its_last_tokens_and_turns_that_are_whole(tokenizer):
    (whole,) = encode(tokenizer, talk(*FOUR))
    flat, mask = ids(whole), [False] * len(whole.prompt) + whole.masks[0].tolist()
    last = len(whole.responses[0]) - whole.masks[0].tolist()[::-1].index(False) + len(whole.prompt)
    for limit in range(2, last + 1):
        options = {"max_prompt_tokens": limit, "long_prompts": "truncate_left"}
        (cut,) = encode(tokenizer, talk(*FOUR), **options)
        assert ids(cut) == flat[last - limit :]
        first = next(i for i, said in enumerate(mask) if said)
        expected = mask[last - limit :] if last - limit < first else [False] * limit + mask[last:]
        got = [False] * len(cut.prompt) + (cut.masks[0].tolist() if cut.masks else [True] * len(cut.responses[0]))
        assert got == expected
    with pytest.raises(InputError, match=r"a response of 6 tokens, EOS included"):
        encode(tokenizer, talk(*FOUR), max_response_tokens=4)


def test_rows_of_one_prompt_and_other_columns_are_both_asked(tokenizer):
    rows = [Record("a", (), (), f"rows.jsonl:{i}", PROMPT, columns={"answer": n}) for i, n in enumerate((1, 2, 1))]
    examples, dropped = Encoder(tokenizer).encode(rows, "prompts")
    assert [example.record.columns["answer"] for example in examples] == [1, 2] and dropped == {"repeated prompt": 1}
    assert len(Encoder(tokenizer).encode(rows, "prompts", every_row=True)[0]) == 3


def test_earlier_turns_of_a_response_that_end_in_another_token_are_learnt_without_it(tokenizer):
    answer = messages(("assistant", "fine"), ("user", "fine?"), ("assistant", "thank you"))
    record = Record(messages(("user", "hello")), (answer, "fine"), ((0, 1),), "rows.jsonl:1", PAIR)
    tokenizer_of = make_tokenizer()
    tokenizer_of.chat_template = templates.HARMONY
    encoder = Encoder(tokenizer_of)
    (example,), _ = encoder.encode([record], "pairs")
    assert tokenizer.decode(example.prompt) == "<|im_start|>user<s>hello<s><|im_start|>assistant"
    assert learnt(tokenizer, example) == [" final<s>fine", " final<s>thank you<|im_end|>"]
    assert learnt(tokenizer, example, 1) == [" final<s>fine<|im_end|>"]
    turns = [("user", "hello"), *((m.role, m.content) for m in answer)]
    assert ids(example) == rendered(tokenizer, templates.HARMONY, turns)
    note = "earlier turn of a response, learnt without an end token, as the chat template ends it with another one"
    assert encoder.noted == {note: 1}


def test_an_earlier_turn_is_not_ended_by_a_later_ones_end(tokenizer):
    # Of the earlier turn neither the words nor an end are there.
    changed = templates.HARMONY.replace("final<s>' + m.content + '<s>'", "final<s>' + m.content | upper + '<s>'")
    answer = messages(("assistant", "fine"), ("user", "and?"), ("assistant", "thank you"))
    record = Record(messages(("user", "hello")), (answer, "fine"), ((0, 1),), "rows.jsonl:1", PAIR)
    with pytest.raises(InputError, match=r"rows.jsonl:1: the end of the assistant's earlier turn.* cannot be found"):
        encode(tokenizer, record, "pairs", template=changed)


def test_both_sides_of_a_pair_are_cut_alike(tokenizer):
    chosen = messages(("assistant", "fine fine fine"), ("user", "how are you, user?"), ("assistant", "thank you"))
    rejected = messages(("assistant", "hello"), ("user", "what?"), ("assistant", "fine"))
    record = Record(messages(("user", "hello world, hello user")), (chosen, rejected), ((0, 1),), "rows.jsonl:1", PAIR)
    (whole,) = encode(tokenizer, record, "pairs")
    longest = max(
        len(whole.prompt) + len(side) - mask.tolist()[::-1].index(False)
        for side, mask in zip(whole.responses, whole.masks, strict=True)
    )
    for over in range(1, longest - 1):
        encoder = Encoder(tokenizer, max_prompt_tokens=longest - over, long_prompts="truncate_left")
        examples, dropped = encoder.encode([record], "pairs")
        if over < len(whole.prompt):
            (cut,) = examples
            assert [ids(cut, side) for side in (0, 1)] == [ids(whole, side)[over:] for side in (0, 1)]
            assert cut.prompt.tolist() == whole.prompt.tolist()[over:]
        else:
            assert examples == [] and dropped == {"pair that differs before its last max_prompt_tokens tokens": 1}
