"""Rows without what a view is made of: what was found, what mends it, and how many there are."""

from __future__ import annotations

import pytest
from test_tokenization import encode

from rlhf_lightning.errors import InputError

FOUND = "there is no response to imitate; keys found: prompt, response; set data.columns: {completion: response}"


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
