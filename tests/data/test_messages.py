"""Messages of other habits: old names of roles and calls, arguments as JSON text, and chats that no user opens."""

from __future__ import annotations

import json

import pytest

from rlhf_lightning.data.messages import checked_messages
from rlhf_lightning.data.records import load_records
from rlhf_lightning.errors import InputError

CALL = {"name": "add", "arguments": '{"a": 1}'}
READ = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def turns(*messages):
    return [message.turn() for message in checked_messages(list(messages), "rows.jsonl:1", "messages")]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
def test_calls_have_their_arguments_as_objects(message):
    assert turns(message) == [{"role": "assistant", "content": None, "tool_calls": READ}]


def test_arguments_that_are_no_object_stay_as_they_are():
    calls = [{"function": {"name": "f", "arguments": text}} for text in ("no JSON", "3", {"a": 1})]
    assert turns({"role": "assistant", "content": None, "tool_calls": calls})[0]["tool_calls"] == calls


def test_roles_of_other_names_are_read():
    given = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"}
    for speaker, text in (("role", "content"), ("from", "value")):
        assert [turns({speaker: name, text: "x"})[0]["role"] for name in given] == list(given.values())


MARKS = ["weight", "train", "training", "train_on_turn", "trainable", "loss", "mask", "loss_mask"]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_that_one_message_is_learnt_or_not_are_refused_where_they_would_change_something(mark):
    answer, question = {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}
    for mute in (False, 0):
        with pytest.raises(
            InputError, match=rf"messages\[0\].{mark}': one message's own {mark} is not read; .*delete the"
        ):
            turns({**answer, mark: mute})
    assert turns({**answer, mark: True}) == [answer]
    if mark != "weight":
        assert turns({**question, mark: False}) == [question]
        with pytest.raises(InputError, match=rf"own {mark} is not read"):
            turns({**question, mark: True})


QUESTION, ANSWER, OTHER = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)
ALL_PARTS = {key: [{"begin_offset": 0, "train": False}] for key in ("train_detail", "training_detail")}
MUTE = {**dict.fromkeys(MARKS, False), "masked": True, **ALL_PARTS}


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_marks_have_no_meaning_on_turns_that_nobody_learns(role):
    message = {"role": role, "content": "x"}
    for marks in ({"masked": False}, {"masked": 0}, {"weight": 0}, {"weight": 1}, {"train_detail": []}, MUTE):
        assert turns({**message, **marks}) == [message], marks
    for parts in ([{"train": True}], [{"train": False}, {"train": True}], [{}], [3]):
        with pytest.raises(InputError, match=r"own train_detail is not read"):
            turns({**message, "train_detail": parts})
    assert turns({**ANSWER, "train_detail": [{"train": True}], "training_detail": []}) == [ANSWER]


@pytest.mark.parametrize("mark", MUTE)
def test_marks_that_earlier_turns_are_not_learnt_hold_where_the_answer_alone_is(write, mark):
    earlier, mute = [QUESTION, {**ANSWER, mark: MUTE[mark]}, QUESTION], {**ANSWER, mark: MUTE[mark]}
    rows = [
        ({"prompt": earlier, "completion": [ANSWER]}, {"prompt": earlier, "completion": [mute]}),
        ({"prompt": earlier, "chosen": "a", "rejected": "b"}, {"prompt": earlier, "chosen": [mute], "rejected": "b"}),
        (
            {"chosen": [*earlier, ANSWER], "rejected": [*earlier, OTHER]},
            {"chosen": [*earlier, mute], "rejected": [*earlier, OTHER]},
        ),
        ({"messages": [*earlier, ANSWER], "label": True}, {"messages": [*earlier, mute], "label": True}),
        ({"messages": [QUESTION, ANSWER]}, {"messages": [*earlier, ANSWER]}),
    ]
    for taken, refused in rows:
        (record,) = load_records(write([taken])).rows
        assert not any(message.more for message in record.prompt)
        with pytest.raises(InputError, match=rf"\[\d\].{mark}': one message's own {mark} is not read"):
            load_records(write([refused]))


@pytest.mark.parametrize("mark", [*MARKS, "masked", "train_detail", "training_detail"])
def test_marks_are_read_beside_calls_and_under_other_names_of_the_role(mark):
    mute = {"masked": True, "train_detail": [{"train": False}], "training_detail": [{"train": False}]}.get(mark, 0)
    calling = {"role": "assistant", "content": None, "tool_calls": READ}
    for message in (
        calling,
        {"role": "assistant", "content": None, "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "gpt", "value": "x"},
    ):
        with pytest.raises(InputError, match=rf"messages\[0\].{mark}': one message's own {mark} is not read"):
            turns({**message, mark: mute})
    assert turns({**calling, "weight": 1, "masked": False, "train": True}) == [calling]
    assert turns({"role": "user", "content": "x", "masked": True}) == [{"role": "user", "content": "x"}]


def test_two_kinds_of_calls_beside_each_other_are_refused():
    with pytest.raises(InputError, match="function_call': stands beside 'tool_calls'"):
        turns({"role": "assistant", "content": None, "function_call": CALL, "tool_calls": READ})


def test_conversations_in_which_no_user_asks_are_kept_and_counted(write):
    opening = [{"role": "system", "content": "Greet."}, {"role": "assistant", "content": "Hello!"}]
    records = load_records(write([{"messages": opening}]))
    assert len(records) == 1 and records.noted == {"conversation in which no user asks": 1} and not records.dropped
