"""Rows: every form is told apart by its keys, and every fault names file, line and key."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_lightning.data.records import load_records, parse_row
from rlhf_lightning.data.rows import transcript_messages
from rlhf_lightning.data.split import split_by_prompt
from rlhf_lightning.data.values import Message
from rlhf_lightning.errors import InputError

USER, ANSWER, OTHER = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "assistant", "content": "go away"},
)


def parse(row):
    dropped: Counter[str] = Counter()
    return parse_row(row, "f.jsonl:3", dropped), dict(dropped)


def test_a_text_pair_keeps_its_columns():
    row, _ = parse({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2, "weight": 0.5, "id": 7, "by": "ann"})
    assert (str(row.form), row.prompt, row.responses, row.pairs) == ("pair", "p", ("a", "b"), ((0, 1),))
    assert (row.margin, row.weight, row.columns, row.text) == (2.0, 0.5, {"id": 7, "by": "ann"}, "p")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "hello", "rejected": "go away"},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
    ],
)
def test_chat_pairs(row):
    record, _ = parse(row)
    assert (record.prompt, record.responses, record.text) == ((Message("user", "hi"),), ("hello", "go away"), "hi")


def test_transcripts_are_split_before_their_last_answer():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    record, _ = parse({"chosen": start + " yes", "rejected": start + " no"})
    assert (str(record.form), record.prompt, record.responses) == ("transcript", start, (" yes", " no"))
    turns = transcript_messages(start)
    assert turns == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))


def test_transcripts_that_differ_before_the_last_answer_are_dropped():
    start = "\n\nHuman: a\n\nAssistant:"
    record = parse({"chosen": f"{start} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{start} e"})
    assert record == (None, {"transcripts that differ before their last answer": 1})


def test_a_ranking_gives_its_pairs_best_first():
    record, _ = parse({"prompt": "p", "completions": ["one", "two", "three"], "ranks": [2, 1, 3]})
    pairs = [(record.responses[a], record.responses[b]) for a, b in record.pairs]
    assert pairs == [("two", "one"), ("two", "three"), ("one", "three")]
    assert record.responses[0] == "two"


def test_ties_give_no_pair_and_are_counted():
    record, dropped = parse({"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 1, 2]})
    assert [(record.responses[i], record.responses[j]) for i, j in record.pairs] == [("a", "c"), ("b", "c")]
    assert dropped == {"ties": 1}


def test_ratings_order_from_high_to_low_and_are_no_margin():
    record, _ = parse({"prompt": "p", "completions": ["a", "b", "c"], "ratings": [1.5, 4, -2]})
    assert record.responses == ("b", "a", "c") and record.pairs == ((0, 1), (0, 2), (1, 2)) and record.margin == 0


def test_empty_and_equal_completions_of_a_ranking_leave_the_other_pairs():
    record, dropped = parse({"prompt": "p", "completions": ["a", " ", "b", "b "], "ranks": [1, 2, 3, 4]})
    assert [(record.responses[i], record.responses[j]) for i, j in record.pairs] == [("a", "b"), ("a", "b ")]
    assert dropped == {"empty response": 3, "equal responses": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty response"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty response"),
        ({"prompt": "p", "chosen": "a", "rejected": "a "}, "equal responses"),
        ({"prompt": "p", "completion": " "}, "empty response"),
        ({"prompt": "p", "completion": " ", "label": True}, "empty response"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty response"),
    ],
)
def test_what_teaches_nothing_is_dropped_and_counted(row, reason):
    assert parse(row) == (None, {reason: 1})


def test_demonstrations_chats_and_prompts():
    assert parse({"prompt": "p", "completion": "c"})[0].responses == ("c",)
    labelled = parse({"prompt": [USER], "completion": [ANSWER], "label": False, "weight": 2})[0]
    assert (str(labelled.form), labelled.responses, labelled.desirable, labelled.weight) == (
        "labelled",
        ("hello",),
        False,
        2,
    )
    assert parse({"prompt": "p", "label": "cat"})[0].columns == {"label": "cat"}  # nothing is judged: a column
    chat = parse({"messages": [USER, ANSWER, USER, OTHER]})[0]
    assert (len(chat.prompt), chat.responses, chat.pairs) == (3, ("go away",), ())
    assert parse({"messages": [USER]})[0].responses == ()
    assert parse({"prompt": [USER]})[0].prompt == (Message("user", "hi"),)
    assert parse({"prompt": "p", "answer": "42"})[0].columns == {"answer": "42"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "key 'rejected': is missing; keys found: chosen, prompt"),
        ({"rejected": "a"}, "key 'chosen': is missing"),
        ({"completion": "a"}, "key 'prompt': is missing; keys found: completion"),
        ({}, "key 'prompt': is missing; keys found: none"),
        ({"question": "q", "answer": "a"}, "set data.columns: {prompt: question, completion: answer}, or rename in"),
        ({"promt": "p", "chosen": "a", "rejected": "b"}, "set data.columns: {prompt: promt}, or rename in the file"),
        ({"instruction": "i", "instances": [{"input": "a"}]}, "key 'instances': holds several inputs and outputs"),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "key 'history': holds earlier turns; write"),
        ({"chosen": "a", "rejected": "b"}, "key 'chosen': there is no key 'prompt', and the text has no"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "key 'chosen': must be text, got null"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "key 'rejected': must be text, got a number"),
        ({"prompt": None}, "key 'prompt': must be text or a list of messages, got null"),
        ({"prompt": " "}, "key 'prompt': is empty"),
        (
            {"prompt": "p", "completion": "c", "label": 2},
            "key 'label': must be true (a response to give) or false, got 2",
        ),
        (
            {"prompt": "p", "completion": "c", "label": None},
            "key 'label': must be true (a response to give) or false, g",
        ),
        ({"prompt": "p", "completion": {}}, "key 'completion': must be text, got an object"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "key 'margin': must be a finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("inf")}, "key 'margin': must be a finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 10**400}, "key 'margin': must be a finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "2"}, "key 'margin': must be a number, got text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "key 'margin': must be a number, got true"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "key 'margin': is -1, but"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0}, "key 'weight': is 0; give a number above 0"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "ranks": [1]}, "key 'ranks': stands beside 'chosen'"),
        ({"prompt": "p", "completions": ["a", "b"]}, "key 'ranks' or 'ratings': is missing"),
        ({"prompt": "p", "ranks": [1, 2]}, "key 'completions': is missing"),
        ({"prompt": "p", "completions": "ab", "ranks": [1, 2]}, "key 'completions': must be a list, got text"),
        ({"prompt": "p", "completions": ["a", 2], "ranks": [1, 2]}, "key 'completions[1]': must be text, got a number"),
        ({"prompt": "p", "completions": ["a"], "ranks": [1]}, "key 'completions': holds 1; a comparison needs"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "key 'ranks': holds 1 for 2 completions"),
        (
            {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]},
            "key 'ranks': must be whole numbers from 1 (best), got 0;",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "ratings": [1, float("nan")]},
            "key 'ratings[1]': must be a finite",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "ratings": [1, 2]},
            "key 'ratings': stands beside",
        ),
        (
            {"input": "q", "preferred_output": [ANSWER]},
            "key 'non_preferred_output': is missing; keys found: input, pref",
        ),
        (
            {"input": "q", "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
            "key 'input': must be an object with messages, got text; repair",
        ),
        (
            {"input": {"messages": "q"}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
            "key 'input.messages': must be a list, got text",
        ),
        ({"messages": [USER], "completion": "c"}, "key 'messages': stands beside 'completion'"),
        ({"messages": []}, "key 'messages': is an empty list"),
        ({"messages": [ANSWER]}, "key 'messages': holds an answer without"),
        ({"messages": ["hi"]}, "key 'messages[0]': must be an object with role and content, got text"),
        ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "key 'messages[0].content': is empty"),
        ({"messages": [{"role": "user"}]}, "key 'messages[0].content': is missing"),
        ({"messages": [{"role": "humam", "content": "x"}]}, "key 'messages[0].role': is 'humam'; use one of system"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "key 'messages[1].weight': one message's own weight is"),
        ({"messages": [{**USER, "content": [1]}]}, "key 'messages[0].content[0]': must be text, got a number"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "key 'messages[0].content[0]': is of type 'image'"),
        ({"messages": [{"role": "user", "content": None}]}, "key 'messages[0].content': must be text, got null"),
        ({"conversations": [{"from": "me", "value": "x"}]}, "key 'conversations[0].from': is 'me'; use one of system"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "conversations[0].value': must be JSON, and is"),
        ({"messages": [USER], "tools": "[{"}, "key 'tools': must be JSON, and is not valid"),
        ({"messages": [USER], "tools": [1]}, "key 'tools[0]': must be an object that describes a tool, got a number"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "key 'system': differs from the system"),
        ({"prompt": [ANSWER]}, "key 'prompt': the only messages are the assistant's; begin with the one to answer"),
        ({"chosen": [USER], "rejected": [USER]}, "key 'chosen': the last message is from 'user'"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "key 'prompt': is missing, and chosen and rejected hold"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]}, "key 'rejected': the conversations differ"),
        (
            {"prompt": "p", "chosen": [USER, ANSWER], "rejected": "b"},
            "key 'chosen': must begin with an assistant message",
        ),
    ],
)
def test_every_refused_row_names_place_and_key(row, message):
    with pytest.raises(InputError) as caught:
        parse(row)
    text = str(caught.value)
    assert text.startswith("f.jsonl:3: key '") and message in text and "\n" not in text


def test_a_key_without_a_value_is_told_as_null_not_as_missing(write):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [({**pair, key: None}, key) for key in pair]
    rows += [({"text": None}, "text"), ({"prompt": None, "completion": "a"}, "prompt")]
    for row, key in rows:
        with pytest.raises(InputError, match=rf"key '{key}': is null; give it a value, or delete the row$"):
            load_records(write([row]))
    with pytest.raises(InputError, match=r"key 'prompt': is null"):
        load_records(write([{"q": None, "completion": "a"}, {"q": "b"}]), columns={"prompt": "q"})
    with pytest.raises(InputError, match=r"key 'prompt': is missing; keys found: by, id"):
        load_records(write([{"by": "ann", "id": 1, "label": None}]))


def test_the_fingerprint_follows_content_not_names(write):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    first = load_records(write(rows, "a.jsonl")).fingerprint()
    assert load_records(write(rows, "b.jsonl")).fingerprint() == first
    assert load_records(write(rows[::-1], "c.jsonl")).fingerprint() != first
    assert load_records(write([rows[0], {**rows[1], "margin": 1}], "d.jsonl")).fingerprint() != first


@pytest.mark.parametrize("seed", [0, 1])
def test_the_split_is_by_prompt_exact_and_stable(write, seed):
    rows = [{"prompt": f"p{i % 40}", "chosen": f"a{i}", "rejected": "b"} for i in range(100)]
    records = load_records(write(rows)).rows
    train, held_out = split_by_prompt(records, 0.1, seed)
    prompts = {row.key for row in held_out}
    assert len(prompts) == 4 and not prompts & {row.key for row in train} and len(train) + len(held_out) == 100
    again = split_by_prompt(records[::-1], 0.1, seed)[1]
    assert {row.key for row in again} == prompts
    assert {row.key for row in split_by_prompt(records, 0.1, seed + 1)[1]} != prompts


def test_one_prompt_cannot_be_split(write):
    records = load_records(write([{"prompt": "p", "completion": "a"}] * 3)).rows
    with pytest.raises(InputError, match=r"data.validation_fraction: 1 distinct prompts cannot be split"):
        split_by_prompt(records, 0.5, 0)


def test_to_answer_its_prompt_a_row_needs_no_responses(write):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "completion": " "},
        {"prompt": "r", "completions": ["a", "b"], "ranks": [1, 1]},
        {"messages": [{"role": "user", "content": "s"}, {"role": "assistant", "content": ""}], "id": 3},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
    ]
    path = write(rows)
    found = load_records(path, prompts=True)
    assert [record.text for record in found.rows] == ["p", "q", "r", "s"] and [r.number for r in found.rows] == [
        0,
        1,
        2,
        3,
    ]
    assert found.read == 5 and dict(found.dropped) == {"transcripts that differ before their last answer": 1}
    assert [record.raw for record in found.rows] == rows[:4]
    trained = load_records(path)
    assert trained.dropped["equal responses"] == 1 and trained.dropped["empty response"] == 2
