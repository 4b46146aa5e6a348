"""Checks chat messages, tools and responses of a row: in the form of OpenAI and transformers, or in ShareGPT's."""

from __future__ import annotations

import json
from typing import Any

from rlhf_lightning.data.files import kind_of, shown
from rlhf_lightning.data.values import ROLES, Message, Prompt, Response, checked_list, checked_text, refused

# Keys that mark single messages as learnt or not. They are not read, so only values that change nothing are accepted:
# for each key first those of learnt turns, then those of others. Tools may write a default `weight` or `masked` always.
_LEARN = ("train", "training", "train_on_turn", "trainable", "loss", "mask", "loss_mask")
_MARKS = {**dict.fromkeys(_LEARN, ((1,), (0,))), "weight": ((1,), (0, 1)), "masked": ((0,), (0, 1))}
_PARTS = ("train_detail", "training_detail")  # marks of parts of a message: a list of objects with `train`
# The names of the roles in other data sets, under `role` or `from`. In ShareGPT, `from: function_call` is an assistant
# message whose value is the call as JSON. OpenAI's older messages have the call under a key of that name.
_CALL = "function_call"
_SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    _CALL: "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def checked_messages(value: Any, where: str, key: str, context: int = 0) -> tuple[Message, ...]:
    """Checks a list of messages: objects with ``role`` and ``content``, or with ``from`` and ``value``.

    Args:
        value: the list.
        where: file and line.
        key: the key of the list.
        context: the number of messages at the beginning that are never learnt, whoever speaks.

    Raises:
        InputError: the list is empty, a role is unknown, a content is no text, or a part of a message is not read.
    """
    if isinstance(value, dict):
        raise refused(where, key, "must be a list of messages, got an object; write one with role and content a turn")
    items = enumerate(checked_list(value, where, key))
    messages = [_message(item, where, f"{key}[{i}]", i >= context) for i, item in items]
    if not messages:
        raise refused(where, key, "is an empty list; give at least one message")
    return tuple(messages)


def checked_prompt(value: Any, where: str, key: str) -> Prompt:
    """A prompt: text that is not empty, or messages up to the one to answer, perhaps with the answer's beginning."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list):
        messages = checked_messages(value, where, key, context=len(value))
        if all(message.role == "assistant" for message in messages):
            raise refused(where, key, "the only messages are the assistant's; begin with the one to answer")
        if "tool_calls" in messages[-1].more:
            raise refused(where, key, "the last message is a tool call; end with the one to answer")
        return messages
    if isinstance(value, str) and not value.strip():
        raise refused(where, key, "is empty; give the text to answer, or delete the row")
    if not isinstance(value, str):
        raise refused(where, key, f"must be text or a list of messages, got {kind_of(value)}; repair the row")
    return value


def checked_response(value: Any, where: str, key: str) -> Response:
    """A response: text, or messages of which the first and the last are the assistant's."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        return checked_text(value, where, key)
    messages = checked_messages(value, where, key)
    if messages[0].role != "assistant":
        raise refused(where, key, "must begin with an assistant message; put earlier turns into the prompt")
    if messages[-1].role != "assistant":
        raise refused(where, key, f"the last message is from '{messages[-1].role}'; end with the assistant's")
    return as_response(messages)


def as_response(messages: tuple[Message, ...]) -> Response:
    """The text of a single message without other keys, so that it can also follow a plain prompt; else the messages."""
    return messages[0].content if len(messages) == 1 and not messages[0].more else messages


def checked_tools(value: Any, where: str, key: str) -> str:
    """The tools as a JSON list, read from a list or from its JSON text; empty if there are none."""
    tools = _from_json(value, where, key) if isinstance(value, str) and value.strip() else value
    if not tools:
        return ""
    tools = [tools] if isinstance(tools, dict) else checked_list(tools, where, key)
    tools = [_from_json(tool, where, f"{key}[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(tools)]
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise refused(where, f"{key}[{i}]", f"must be an object that describes a tool, got {kind_of(tool)}")
    return _to_json(tools)


def _message(item: Any, where: str, at: str, learnt: bool) -> Message:
    if not isinstance(item, dict):
        raise refused(where, at, f"must be an object with role and content, got {kind_of(item)}")
    speaker, text = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    more = {name: value for name, value in item.items() if name not in (speaker, text) and value is not None}
    for name in ("tool_calls", _CALL):  # tables hold lists as text
        if isinstance(more.get(name), str) and more[name].strip():
            more[name] = _from_json(more[name], where, f"{at}.{name}")
    if not more.get("tool_calls", True):  # an empty list says that no tool is called
        del more["tool_calls"]
    if _CALL in more:
        if "tool_calls" in more:
            raise refused(where, f"{at}.{_CALL}", "stands beside 'tool_calls'; keep one of the two")
        more["tool_calls"] = [{"type": "function", "function": more.pop(_CALL)}]
    if "tool_calls" in more:
        more["tool_calls"] = _with_objects(more["tool_calls"])
    if speaker not in item:
        raise refused(where, f"{at}.{speaker}", "is missing; a message has role and content")
    role = _role(item, speaker, where, at)
    _check_marks(more, learnt and role == "assistant", where, at)
    if item.get(text) is None and "tool_calls" in more:
        return Message(role, "", _to_json(more))
    if text not in item:
        raise refused(where, f"{at}.{text}", f"is missing; a message has {speaker} and {text}")
    content = _content(item[text], where, f"{at}.{text}")
    if speaker == "from" and item[speaker] == _CALL:
        calls = _from_json(content, where, f"{at}.{text}")
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return Message(role, "", _to_json({"tool_calls": _with_objects(calls), **more}))
    if role == "user" and not content.strip():
        raise refused(where, f"{at}.{text}", "is empty; give the text to answer, or delete the row")
    if not content and "tool_calls" in more:
        more["content"] = ""  # keep the row's empty text, since no content would become null
    return Message(role, content, _to_json(more) if more else "")


def _check_marks(more: dict[str, Any], learnt: bool, where: str, at: str) -> None:
    """Removes marks that agree with what is learnt anyway from a message's other keys, and refuses other marks."""
    for mark in (*_MARKS, *_PARTS):
        given = more.pop(mark, None)
        usual = _MARKS.get(mark, _MARKS["train"])[0 if learnt else 1]
        parts = given if isinstance(given, list) and mark in _PARTS else [given]
        said = [part.get("train") if isinstance(part, dict) and mark in _PARTS else part for part in parts]
        if given is not None and any(value not in usual for value in said):
            remedy = "give the row a 'weight'" if mark == "weight" else "end a row in each answer to learn"
            problem = f"one message's own {mark} is not read; {remedy}, or delete the key"
            raise refused(where, f"{at}.{mark}", problem)


def _with_objects(calls: Any) -> Any:
    """The calls with arguments as objects, which chat templates read; OpenAI writes them as JSON text."""
    if not isinstance(calls, list):
        return calls
    return [_with_object(call) for call in calls]


def _with_object(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _role(item: dict[str, Any], speaker: str, where: str, at: str) -> str:
    given = item[speaker]
    role = speaking(given)
    if role is None:
        said = repr(given) if isinstance(given, str) else kind_of(given)
        raise refused(where, f"{at}.{speaker}", f"is {shown(said)}; use one of {', '.join(ROLES)}")
    return role


def speaking(given: Any) -> str | None:
    """The role that a message's ``role`` or ``from`` means; None if it is unknown."""
    return _SPEAKERS.get(given) if isinstance(given, str) else None


def _content(value: Any, where: str, key: str) -> str:
    """The text of a content: a text, or a list of text parts, which are joined without anything between them."""
    if not isinstance(value, list):
        return checked_text(value, where, key)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind != "text":
            raise refused(where, f"{key}[{i}]", f"is of type {kind!r}; only text is read: delete the row")
        text = part.get("text") if isinstance(part, dict) else part
        texts.append(checked_text(text, where, f"{key}[{i}]"))
    return "".join(texts)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # a table's dates and the like become text


def _from_json(text: str, where: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise refused(where, key, "must be JSON, and is not valid; repair it, or delete the row") from None
