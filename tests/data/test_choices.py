"""Rows without what a view is made of: what was found, what mends it, and how many there are."""

from __future__ import annotations

import pytest
from test_tokenization import encode

from rlhf_lightning.data.check import check
from rlhf_lightning.errors import InputError

FOUND = "there is no response to imitate; keys found: prompt, response; set data.columns: {completion: response}"


def test_conversations_without_an_answer_are_told_what_mends_them(write, tokenizer):
    question = [{"role": "user", "content": "q"}]
    answered = [*question, {"role": "assistant", "content": "a"}]
    for messages, remedy in (([*answered, *question], "take the turn off"), (question, "leave the row out")):
        with pytest.raises(InputError) as caught:
            encode(write, tokenizer, [{"messages": messages}] * 8)
        told = f"key 'messages': the conversation ends with the user's turn; add the assistant's answer, or {remedy}"
        assert f"rows.jsonl:1: {told} (8 of 8 rows have this)" in str(caught.value)
    (line,) = check([write([{"messages": question}] * 2 + [{"messages": answered}])]).files[0].advice
    assert line.startswith("2 of 3 conversations end without the assistant's answer: they serve as prompts alone")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("demonstrations", {"response": "r"}, FOUND),
        ("demonstrations", {}, "there is no response to imitate; keys found: prompt; add key 'completion'"),
        ("pairs", {"better": "a", "worse": "b"}, "set data.columns: {chosen: better, rejected: worse}"),
        ("pairs", {"responses": ["a"], "scores": [1]}, "set data.columns: {completions: responses, ratings: scores}"),
        ("pairs", {"completion": "a", "kto_tag": True}, "for KTOModule set data.columns: {label: kto_tag}"),
        ("pairs", {"completion": "a"}, "keys found: completion, prompt; add 'chosen' and 'rejected'"),
        ("labels", {"completion": "a", "desirable": True}, "set data.columns: {label: desirable}"),
    ],
)
def test_rows_are_counted_with_what_mends_them(write, tokenizer, kind, row, message):
    with pytest.raises(InputError) as caught:
        encode(write, tokenizer, [{"prompt": f"p{i}", **row} for i in range(30)], kind)
    assert message in str(caught.value) and str(caught.value).endswith("(30 of 30 rows have this)")
    with pytest.raises(InputError, match=r"add "):
        encode(write, tokenizer, [{"prompt": "p", **row}], kind, columns="--columns")
