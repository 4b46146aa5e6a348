"""Templates: which is taken, what responses read like without its marks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.template import ChatTemplate, decoded, template_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from chat_tokenizer import TEMPLATE, make_tokenizer


def test_a_file_wins_and_its_byte_order_mark_is_none_of_its_text(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + TEMPLATE.encode())
    assert template_text(make_tokenizer(), str(path)) == TEMPLATE
    with pytest.raises(InputError, match=r"data.chat_template_name: has no meaning beside data.chat_template"):
        template_text(make_tokenizer(), str(path), "default")
    with pytest.raises(InputError, match="the tokenizer has one template without a name"):
        template_text(make_tokenizer(), None, "default")


def test_responses_keep_the_tokens_of_a_format_and_lose_those_of_turns():
    tokenizer = make_tokenizer(additional_special_tokens=["<|im_start|>", "<think>"])
    ids = tokenizer("<think>hello<|im_start|> you<pad><|im_end|>").input_ids
    assert decoded(tokenizer, [ids]) == ["<think>hello you"]
    assert decoded(tokenizer, [ids], [tokenizer.convert_tokens_to_ids("<think>")]) == ["hello you"]
    assert decoded(make_tokenizer(), [tokenizer("hello<|im_end|>").input_ids]) == ["hello"]


def test_a_clock_is_read_once_for_all_and_only_in_plain_formats():
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "a"}]
    told = ChatTemplate(tokenizer, "{{ strftime_now('%Y') }}", date="2001-05-06")
    assert told.dated and told.render(chat) == "2001"
    hidden = ChatTemplate(tokenizer, "{% set f = '%Y' %}{{ strftime_now(f) }}", date="2001-05-06")
    with pytest.raises(ValueError, match="a format that is no plain text"):
        hidden.render(chat)
    assert not ChatTemplate(tokenizer, TEMPLATE).dated
