"""What a chat template leaves out of messages is refused, or counted: tools, words, reasoning and other keys."""

from __future__ import annotations

import json

import pytest
import templates
from chat_tokenizer import make_tokenizer
from chats import DEMONSTRATION, FOUR, TALK, TOOL, encode, ids, learnt, messages, noted, talk

from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.data.values import Message
from rlhf_lightning.errors import InputError

UNREAD = "message with key '{}', which the chat template does not read"


def test_tools_results_and_calls_are_rendered_and_only_the_assistant_is_learnt(tokenizer):
    call = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]})
    turns = (*messages(("user", "one and one?")), Message("assistant", "", call), Message("tool", "2"))
    record = Record(turns, ("two",), (), "rows.jsonl:1", TALK, tools=json.dumps(TOOL))
    (example,) = encode(tokenizer, record, template=templates.TOOLS)
    text = tokenizer.decode(ids(example))
    assert text.startswith("TOOLS " + json.dumps(TOOL)) and "<|im_start|>tool\n2<|im_end|>" in text
    first, second = learnt(tokenizer, example)
    assert '"name": "add"' in first and first.endswith("<|im_end|>") and second == "two<|im_end|>"
    with pytest.raises(InputError, match=r"rows.jsonl:1: key 'tools': the chat template has no place for tools"):
        encode(tokenizer, record)
    deaf = templates.TOOLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    with pytest.raises(
        InputError, match=r"rows.jsonl:1: the chat template leaves out content of message 2 \(role tool"
    ):
        encode(tokenizer, record, template=deaf)
    silent = Record((turns[0], Message("assistant", "", call), turns[2]), ("two",), (), "rows.jsonl:1", TALK)
    strict = templates.CHATML.replace("(m.content or '')", "m.content")  # joins no text to null
    for template in (templates.CHATML, strict):
        with pytest.raises(InputError, match="the chat template leaves out tool_calls of message 1"):
            encode(tokenizer, silent, template=template)


def test_a_message_is_left_out_also_where_another_says_the_same(tokenizer):
    deaf = templates.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'critic' %}")
    turns = [("user", "is it fine?"), ("critic", "fine"), ("user", "and you?"), ("assistant", "fine")]
    with pytest.raises(InputError, match=r"leaves out content of message 1 \(role critic\)"):
        encode(tokenizer, talk(*turns), template=deaf)
    with pytest.raises(InputError, match="leaves out content of message 1"):
        encode(tokenizer, talk(*turns[:3]), template=deaf, kind="prompts")


def test_words_beside_a_call_that_the_template_leaves_out_are_refused(tokenizer):
    call = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]})
    turns = (*messages(("user", "one and one?")), Message("assistant", "I add", call), Message("tool", "2"))
    record = Record(turns, ("two",), (), "rows.jsonl:1", TALK, tools=json.dumps(TOOL))
    (example,) = encode(tokenizer, record, template=templates.TOOLS)
    assert "I add[{" in tokenizer.decode(ids(example))
    calls_alone = templates.TOOLS.replace("(m.content or '') +", "(m.content if not m.tool_calls else '') +")
    with pytest.raises(InputError, match=r"leaves out content of message 1 \(role assistant\)"):
        encode(tokenizer, record, template=calls_alone)


@pytest.mark.parametrize("marks", ["<think>|</think>", "[THINK]|[/THINK]"])
def test_a_part_that_the_template_drops_of_responses_is_named_and_counted(tokenizer, marks):
    opened, closed = marks.split("|")
    tokenizer_of = make_tokenizer()
    # As DeepSeek-R1's: what stands before the end of the reasoning is not rendered, and sampling asks with its opening.
    tokenizer_of.chat_template = templates.OPENS.replace("(m.content or '')", f"m.content.split('{closed}')[-1]")
    encoder = Encoder(tokenizer_of)
    said = [f"{opened}\nhello\n{closed}\n\nfine", f"{opened}\n\n{closed}\n\nfine", "fine"]
    for text in said:
        (example,), _ = encoder.encode([talk(("user", "hello"), ("assistant", text))], "demonstrations")
        assert tokenizer.decode(ids(example)).split("assistant\n")[1].strip() == "fine<|im_end|>"
    (line,) = encoder.conversations.losses
    assert line.startswith(
        f"the chat template drops {opened}…{closed} from 2 of 3 responses, which are learnt without it;"
    )
    # Words that stand between other marks are not lost.
    tokenizer_of.chat_template = templates.CHATML.replace(
        "(m.content or '')", "m.content.replace('think>', 'thought>')"
    )
    encoder = Encoder(tokenizer_of)
    encoder.encode([talk(("user", "hello"), ("assistant", "<think>\nwho?\n</think>\n\nfine"))], "demonstrations")
    assert encoder.conversations.losses == [] and encoder.noted == {"response that the chat template changes": 1}
    tokenizer_of.chat_template = templates.CHATML.replace("(m.content or '')", "m.content.replace('b>', 'i>')")
    for text in ("<b>fine</b>", "hello <b>fine</b>", "<b>fine</b> fine"):
        encoder = Encoder(tokenizer_of)
        encoder.encode([talk(("user", "hello"), ("assistant", text))], "demonstrations")
        assert encoder.conversations.losses == []
    # Nor is a part that is there still, with other words.
    tokenizer_of.chat_template = templates.CHATML.replace("(m.content or '')", "m.content.replace('who', 'how')")
    encoder = Encoder(tokenizer_of)
    encoder.encode([talk(("user", "hello"), ("assistant", "<think>\nwho?\n</think>\n\nfine"))], "demonstrations")
    assert encoder.conversations.losses == [] and encoder.noted == {"response that the chat template changes": 1}


@pytest.mark.parametrize(
    "text",
    [
        "<b>how</b><notes>who?</notes>fine",
        "<b>how</b><notes></notes>fine",
        "<notes>who?</notes><b>fine</b>",
        "<notes>fine</notes>fine",
    ],
)
def test_of_several_parts_the_one_that_the_template_drops_is_named(text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = templates.CHATML.replace("(m.content or '')", "m.content.split('</notes>')[-1]")
    encoder = Encoder(tokenizer)
    encoder.encode([talk(("user", "hello"), ("assistant", text))], "demonstrations")
    (line,) = encoder.conversations.losses
    assert line.startswith("the chat template drops <notes>…</notes> from 1 of 1 responses")


def reasoned(**more) -> Record:
    answer = Message("assistant", "fine", json.dumps(more))
    return Record(messages(FOUR[0]), ((answer,),), (), "rows.jsonl:1", TALK)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_to_learn_that_the_template_does_not_read_is_refused(key):
    with pytest.raises(InputError, match=rf"1: the chat template does not read {key} of message 1 .*delete the key"):
        encode(None, reasoned(**{key: "because"}), template=templates.CHATML)
    tokenizer_of = make_tokenizer()
    tokenizer_of.chat_template = templates.CHATML.replace("(m.content or '')", f"(m.{key} or '') + (m.content or '')")
    # The same words under all names, of which one is read: nothing is lost.
    record = reasoned(reasoning_content="because", thinking="because", reasoning="because")
    (example,), _ = Encoder(tokenizer_of).encode([record], "demonstrations")
    assert learnt(tokenizer_of, example) == ["becausefine<|im_end|>"]


def test_a_flag_of_reasonings_name_is_no_reasoning():
    assert noted(templates.CHATML, reasoned(thinking=True)) == {UNREAD.format("thinking"): 1}


def test_reasoning_under_another_name_than_the_template_reads_is_to_be_renamed():
    template = templates.CHATML.replace("(m.content or '')", "(m.reasoning or '') + (m.content or '')")
    with pytest.raises(InputError, match=r"does not read thinking of message 1 .* but reads reasoning: rename the key"):
        encode(None, reasoned(thinking="because"), template=template)


def test_other_keys_that_the_template_does_not_read_are_counted_also_earlier_reasoning(tokenizer):
    values = {
        "calm": True,
        "train_this": False,
        "mood": 0,
        "tags": ["a"],
        "said": {"by": "b"},
        "none": [],
        "blank": " ",
    }
    earlier = Message("assistant", "fine", json.dumps({"reasoning": "because", **values}))
    prompt = (Message("user", "hello", json.dumps({"name": "Ann"})), earlier, Message("user", "how are you?"))
    encoder = Encoder(tokenizer)
    record = Record(prompt, ("fine",), (), "rows.jsonl:1", DEMONSTRATION)
    encoder.encode([record, record], "demonstrations")
    keys = ("name", "reasoning", "calm", "train_this", "mood", "tags", "said")
    assert encoder.noted == {UNREAD.format(key): 2 for key in keys}
    with pytest.raises(InputError, match="does not read reasoning of message 1"):  # where it is learnt
        encode(tokenizer, Record(prompt, ("fine",), (), "rows.jsonl:1", TALK))


def asking(*turns: Message) -> Record:
    return Record(turns, ("fine",), (), "rows.jsonl:1", DEMONSTRATION)


def keyed(role: str, text: str, **more) -> Message:
    return Message(role, text, json.dumps(more))


def test_a_key_that_a_template_asks_for_is_read_whatever_its_value():
    asks = templates.CHATML.replace("(m.content or '')", "('calm ' if m.calm else '') + (m.content or '')")
    for value in (True, False, 1, 0, "very", ["very"]):
        assert noted(asks, asking(keyed("user", "hello", calm=value))) == {}
    known = templates.CHATML.replace("(m.content or '')", "('calm ' if m.calm is defined else '') + (m.content or '')")
    assert noted(known, asking(keyed("user", "hello", calm=True))) == {}


def test_a_key_may_be_read_behind_one_message_and_not_behind_another():
    after_user = templates.CHATML.replace(
        "(m.content or '')",
        "((m.name or '') if not loop.first and messages[loop.index0 - 1].role == 'user' else '') + (m.content or '')",
    )
    user, answer, critic = Message("user", "hello"), Message("assistant", "fine"), keyed("critic", "no", name="Ann")
    behind_user, behind_answer = asking(user, critic), asking(user, answer, critic)
    for records in ((behind_user, behind_answer), (behind_answer, behind_user)):
        assert noted(after_user, *records) == {UNREAD.format("name"): 1}


def test_a_key_may_be_read_where_another_is_not_there():
    either = templates.CHATML.replace("(m.content or '')", "(m.name or m.alias or '') + (m.content or '')")
    alone, beside = asking(keyed("user", "hello", alias="A")), asking(keyed("user", "hello", name="Ann", alias="A"))
    for records in ((alone, beside), (beside, alone)):
        assert noted(either, *records) == {UNREAD.format("alias"): 1}


def test_a_key_that_a_template_checks_is_read():
    strict = templates.CHATML.replace(
        "{{ '<|im_start|>' + m.role",
        "{% if m.role == 'user' and m.name != 'Ann' %}{{ raise_exception('who?') }}{% endif %}"
        "{{ '<|im_start|>' + m.role",
    )
    assert noted(strict, asking(keyed("user", "hello", name="Ann"))) == {}


def test_the_keys_of_the_tool_protocol_are_not_counted():
    result = keyed("tool", "2", name="add", tool_call_id="call_1", mood="calm")
    call = keyed("assistant", "", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}])
    record = asking(Message("user", "one and one?"), call, result)
    assert noted(templates.TOOLS, record) == {UNREAD.format("mood"): 1}


def test_what_is_shown_beside_tools_may_not_be_without():
    template = templates.TOOLS.replace(
        "{% for m in messages %}", "{% for m in messages if tools or m.role != 'tool' %}"
    )
    turns = messages(("user", "one and one?"), ("tool", "2"))
    given = Record(turns, ("two",), (), "rows.jsonl:1", DEMONSTRATION, tools=json.dumps(TOOL))
    lacking = Record(turns, ("two",), (), "rows.jsonl:2", DEMONSTRATION)
    with pytest.raises(
        InputError, match=r"rows.jsonl:2: the chat template leaves out content of message 1 \(role tool"
    ):
        noted(template, given, lacking)
