"""The chat template of a tokenizer: the choice among several, the rendering, and the token that ends a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError

# Marks a text whose place in a rendering is wanted. It is a character of Unicode's last private plane.
MARK = "\U0010fffd"
# Replaces the template's clock by Jinja, because transformers passes no function of ours to a template.
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ dates_of_run[format] if format in dates_of_run else "
    "raise_exception('strftime_now is called with a format that is no plain text') }}{%- endmacro -%}"
)
_FORMATS = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class TemplateRefuses(ValueError):
    """The template raised over the messages it was given."""


class ChatTemplate:
    """One template of one tokenizer, with what every rendering of it is given.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the Jinja source.
        options: variables of the template, as ``enable_thinking``.
        date: what ``strftime_now`` says in it, as YYYY-MM-DD; None for today.

    Raises:
        InputError: an option that the template does not read, or no such date.
    """

    def __init__(
        self, tokenizer: Any, text: str, options: Mapping[str, Any] | None = None, date: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.options = dict(options or {})
        self.chosen = tuple(self.options)  # the variables that somebody set
        unread = [name for name in self.chosen if not re.search(rf"\b{re.escape(name)}\b", text)]
        if unread:
            raise InputError(
                f"data.chat_template_kwargs.{unread[0]}: the chat template reads no such variable; leave it out"
            )
        self.dated = "strftime_now(" in text
        self._source = text
        if self.dated:
            day = (
                datetime.fromisoformat(checked_date(date))
                if date
                else datetime.combine(Date.today(), datetime.min.time())
            )
            self._source = _CLOCK + text
            self.options["dates_of_run"] = {format: day.strftime(format) for _, format in _FORMATS.findall(text)}

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, generation_prompt: bool = False
    ) -> str:
        """The messages as the template writes them.

        Raises:
            TemplateRefuses: a template is a program, and may raise anything.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.options,
            )
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TemplateRefuses(reason) from None

    @cached_property
    def tail(self) -> str | None:
        """What follows the assistant's text where a conversation ends with it; None where the template cannot tell."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        try:
            rendered = self.render(chat)
        except TemplateRefuses:
            return None
        return rendered.rpartition(MARK)[2] if MARK in rendered else None

    @cached_property
    def turn_end(self) -> str:
        """The token that ends the assistant's turn; empty where the template ends it with none."""
        found = self.tokens.search(self.tail or "")
        return found[0] if found else ""

    @property
    def turn_end_id(self) -> int | None:
        """Its id."""
        return self.tokenizer.convert_tokens_to_ids(self.turn_end) if self.turn_end else None

    @cached_property
    def ending(self) -> tuple[str, str]:
        """What follows the assistant's text, up to the end of its turn and past it; empty where nobody can tell."""
        tail = self.tail or ""
        end = tail.index(self.turn_end) + len(self.turn_end) if self.turn_end else len(tail.rstrip())
        return tail[:end], tail[end:]

    @cached_property
    def earlier_end(self) -> str:
        """The token that ends the assistant's turn where others follow it; empty where it ends with none."""
        user = {"role": "user", "content": "a"}
        try:
            rendered = self.render([user, {"role": "assistant", "content": MARK}, user])
        except TemplateRefuses:
            return ""
        found = self.tokens.match(rendered.partition(MARK)[2])
        return found[0] if found else ""

    @cached_property
    def tokens(self) -> re.Pattern[str]:
        """The tokens that stand in a rendering for themselves, special or not, but for runs of white space."""
        return tokens_pattern([str(token) for token in self.tokenizer.added_tokens_decoder.values()])

    @cached_property
    def markers(self) -> set[str]:
        """The tokens with which the template sets a user's turn apart, and ends the assistant's."""
        try:
            rendered = self.render([{"role": "user", "content": "a"}])
        except TemplateRefuses:
            rendered = ""
        return {*self.tokens.findall(rendered), *([self.turn_end] if self.turn_end else [])}


def tokens_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; runs of white space are left out."""
    longest_first = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def checked_date(date: str) -> str:
    """The date, as it was given.

    Raises:
        InputError: it is none.
    """
    try:
        return Date.fromisoformat(date).isoformat()
    except ValueError:
        raise InputError(f"data.date: {date!r} is no date; write it as 2026-01-31") from None


def template_text(tokenizer: Any, path: str | None = None, name: str | None = None) -> str | None:
    """The Jinja source to use: the file's, or the tokenizer's of that name, or its default; None where it has none.

    Raises:
        InputError: the file cannot be read, or the tokenizer has no template of that name, or none for a default.
    """
    if path is not None and name is not None:
        raise InputError("data.chat_template_name: has no meaning beside data.chat_template; leave one of them out")
    if path is not None:
        try:
            return Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data.chat_template: {path} cannot be read ({error}); give a Jinja text file") from None
    own = getattr(tokenizer, "chat_template", None)
    if not isinstance(own, Mapping):
        if name is not None:
            raise InputError(
                f"data.chat_template_name: {name!r} is not there, the tokenizer has "
                f"{'one template without a name' if own else 'no chat template'}; leave it out"
            )
        return own
    wanted = name or "default"
    if wanted not in own:
        raise InputError(
            f"data.chat_template_name: the tokenizer has no template named {wanted!r}; set it to one of "
            f"{', '.join(map(json.dumps, sorted(own)))}"
        )
    return own[wanted]


def default_text(tokenizer: Any) -> str | None:
    """The Jinja source of the tokenizer's only, or default, template; None where it has none."""
    own = getattr(tokenizer, "chat_template", None)
    return own.get("default") if isinstance(own, Mapping) else own


def decoded(tokenizer: Any, rows: Sequence[Sequence[int]], ends: Sequence[int] = ()) -> list[str]:
    """Responses as people and rewards read them: without BOS, EOS, pad, what ended them and the marks of turns.

    Other special tokens, as those of a format (``<think>``), stay.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rows: the ids of each response.
        ends: ids that end a response.
    """
    text = default_text(tokenizer)
    markers = ChatTemplate(tokenizer, text).markers if text else set()
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    left_out = {tokenizer.convert_tokens_to_ids(str(token)) for token in (*markers, *named) if token is not None}
    left_out |= set(ends)
    kept = (special | set(tokenizer.all_special_ids)) - left_out
    if not any(id in kept for row in rows for id in row):
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    return tokenizer.batch_decode([[id for id in row if id not in left_out] for row in rows], skip_special_tokens=False)


def turn_end_id(tokenizer: Any) -> int | None:
    """The token that ends the assistant's turn in the tokenizer's (default) template; None where there is none."""
    text = default_text(tokenizer)
    return ChatTemplate(tokenizer, text).turn_end_id if text else None
