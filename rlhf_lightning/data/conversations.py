"""Renders chats as text with the chat template, and finds the spans that the assistant says.

A conversation is rendered up to each assistant turn that is to be learnt. The turn begins where its prompt ends, after
the generation prompt, and runs to the token that ends it. Some templates change earlier turns once others follow. Then
each turn becomes a sequence of its own, with the prompt that sampling would use.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.hidden import hide, shown, unhidden
from rlhf_lightning.data.reading import Reading, dropped_part, is_silent, left_out
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.skeletons import Place, Skeletons
from rlhf_lightning.data.spelling import without_end
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.template import MARK, ChatTemplate, TemplateRefuses

UNLIKE = (
    "turn that the chat template begins without its generation prompt, learnt as the template writes it, without the "
    "{} that sampling adds"
)
TWICE = "response that repeats the end of the generation prompt, which is taken once"
CHANGED = "response that the chat template changes"
FOLDED = "system message put into the user's, as the chat template takes no system message"
FOLDED_LATE = "system message put into the first user's, as the chat template shows it only in the last message"
RENAMED = "developer message given as the system's, as the chat template has no developer role"
ENDED = "response that spells its own end token, which is taken once"
ENDLESS = "earlier turn of a response, learnt without an end token, as the chat template ends it with another one"
SILENT = "empty turn of the assistant's, not learnt"
OPENING = "opening turn of the assistant's, not learnt, as no message asks for it"
APART = "conversation split into one sequence a turn, as the chat template changes earlier turns"

_LENGTH_CHECKS = tuple(2**power for power in range(4, 30))  # turns before which the prompt's length is checked


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence as text: the prompt, then in turn what the assistant says and what others say in between."""

    pieces: tuple[str, ...]
    chat: bool = True  # whether a template wrote it, so that its special tokens are to be recognised
    ended: bool = False  # whether it ends with the token that ends a turn
    # Pairs of a private character in the pieces and the special token, spelled by a user, that it stands for.
    hidden: tuple[tuple[str, str], ...] = ()

    @property
    def context(self) -> str:
        """The text before the assistant's last turn; all of it if there is no such turn."""
        return "".join(self.pieces[:-1]) if len(self.pieces) > 1 else self.pieces[0]

    @property
    def turns(self) -> tuple[str, ...]:
        """What the assistant says, turn by turn."""
        return self.pieces[1::2]


@dataclass(frozen=True)
class _Turn:
    prompt: str
    whole: str  # the rendering of the conversation up to this turn
    start: int  # where the assistant's words begin in `whole`, and where they end
    end: int
    ended: bool


@dataclass
class _Chat:
    """A record's messages as the template gets them."""

    record: Record
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    first: int  # the number of the response's first message
    prefill: str | None  # the beginning of the response that the prompt has already
    hidden: dict[str, str]
    rendered: dict[Place, str] = field(default_factory=dict)  # renderings of its beginnings

    @property
    def where(self) -> str:
        return self.record.where


class Conversations:
    """Renders records' prompts and responses with one template. ``noted`` counts what users may not expect.

    Args:
        template: the chat template.
        special: pattern of the special tokens that stay text if a user's text spells them; None for none.
        too_long: tells whether a prompt is so long that it will be refused or dropped.
    """

    def __init__(
        self, template: ChatTemplate, special: Any | None, too_long: Callable[[str], bool] = lambda prompt: False
    ) -> None:
        self.template = template
        self._too_long = too_long
        self.special = special
        self.noted: Counter[str] = Counter()
        self.turns = 0  # assistant turns that were looked for in renderings
        self.lost: Counter[str] = Counter()  # turns of which the template drops a part, by its marks: <think>…</think>
        # How a system or developer message is given: as it is, as "system", or inside the user's message.
        self._roles: dict[str, str] = {}
        self._has_tools: bool | None = None
        self._reading = Reading(template, self.noted)
        self._skeletons = Skeletons(template)

    @property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end a turn, also if the assistant's own text spells one at its end."""
        return (self.template.turn_end, self.template.tokenizer.eos_token)

    @property
    def losses(self) -> list[str]:
        """One line for each kind of part that the template drops from responses."""
        return [
            f"the chat template drops {part} from {count:,} of {self.turns:,} responses, which are learnt without it; "
            "set data.chat_template to one that keeps it"
            for part, count in self.lost.most_common()
        ]

    def prompt(self, record: Record) -> Rendered:
        """The prompt as sampling gets it."""
        chat = self._chat(record, None)
        text = self._prompt_text(chat, chat.first)
        self._reading.check(chat.where, chat.messages, chat.tools, ())
        self._check_hidden(chat, text, chat.first)
        return Rendered((text,), hidden=tuple(chat.hidden.items()))

    def answered(self, record: Record, number: int, every_turn: bool = False) -> list[Rendered]:
        """Response ``number`` in its conversation. With ``every_turn`` the assistant's earlier turns are learnt, too.

        Returns one sequence; or one for each turn, if ``every_turn`` is set and the template changes earlier turns.

        Raises:
            InputError: the template refuses the messages or leaves some out, or an assistant turn cannot be found.
        """
        chat = self._chat(record, number)
        spoken = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not (every_turn and record.form.conversation):
            spoken = [i for i in spoken if i >= chat.first]
        silent = [i for i in spoken[:-1] if is_silent(chat.messages[i])]  # an empty last one is dropped with its row
        self.noted[SILENT] += len(silent)
        spoken = [i for i in spoken if i not in silent]
        asked = [i for i in spoken if any(message["role"] != "assistant" for message in chat.messages[:i])]
        self.noted[OPENING] += len(spoken) - len(asked)
        if not asked:
            raise InputError(f"{record.where}: the assistant's turns answer no message; put the user's before them")
        if not (chat.tools or chat.hidden or chat.prefill):
            places = [place for i in asked for place in ((i, True), (i + 1, False))]
            chat.rendered = self._skeletons.renderings(chat.messages[: asked[-1] + 1], places)
        turns: list[_Turn] = []
        for number, i in enumerate(asked):
            # Each turn is rendered with all turns before it. If its prompt will be refused, only the last turn counts.
            if number in _LENGTH_CHECKS and self._too_long(turns[-1].prompt):
                turns.append(self._turn(chat, asked[-1]))
                break
            turns.append(self._turn(chat, i))
        self._reading.check(chat.where, chat.messages[: asked[-1] + 1], chat.tools, asked)
        last = turns[-1].whole
        if all(turn.ended and last.startswith(turn.whole[: turn.end]) for turn in turns[:-1]):
            return [self._joined(chat, turns)]
        if every_turn and record.form.conversation:
            self.noted[APART] += 1
            return [self._joined(chat, [turn]) for turn in turns]
        words = [(chat.messages[i]["content"] or "").strip() for i in asked]
        return [self._joined(chat, self._found_again(chat, turns, words))]

    # -- the messages --------------------------------------------------------------------------------------------------

    def _chat(self, record: Record, number: int | None) -> _Chat:
        prompt = [message.turn() for message in record.messages]
        answer = [] if number is None else [message.turn() for message in record.answer(number)]
        if not prompt:
            raise InputError(f"{record.where}: key 'chosen': the transcript has no Human turn; delete the row")
        prompt = [*map(self._without_end, prompt[:-1]), prompt[-1]]  # the response may continue the last message
        answer = list(map(self._without_end, answer))
        prefill = None
        if prompt[-1]["role"] == "assistant":
            begun = prompt.pop()
            prefill = begun["content"] or ""
            merged = {**begun, **(answer[0] if answer else {})}
            merged["content"] = prefill + ((answer[0]["content"] or "") if answer else "")
            answer = [merged, *answer[1:]]
        tools = json.loads(record.tools) if record.tools else None
        prompt = self._steered(prompt)
        messages, tools, hidden = hide([*prompt, *answer], tools, self.special)
        if tools is not None:
            self._check_tools(messages[: len(prompt)], tools, record.where)
        if prefill is not None and hidden:
            prefill = hide([{"content": prefill}], None, self.special, hidden)[0][0]["content"]
        return _Chat(record, messages, tools, len(prompt), prefill, hidden)

    def _without_end(self, message: dict[str, Any]) -> dict[str, Any]:
        """An assistant turn without the EOS or turn end that its text spells, which the template writes itself."""
        text = message["content"] or ""
        content = without_end(text, self.ends) if message["role"] == "assistant" else text
        if content == text:
            return message
        self.noted[ENDED] += 1
        return {**message, "content": content}

    def _steered(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template takes them: a system message may have to become the beginning of the user's."""
        if [message["role"] for message in messages[:2]] not in (["system", "user"], ["developer", "user"]):
            return messages
        role = messages[0]["role"]
        if role not in self._roles:
            self._roles[role] = self._how_to_steer(role)
        how = self._roles[role]
        if how not in (FOLDED, FOLDED_LATE):
            self.noted[RENAMED] += how != role
            return [{**messages[0], "role": how}, *messages[1:]]
        self.noted[how] += 1
        text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return [{**messages[1], "content": text}, *messages[2:]]

    def _how_to_steer(self, role: str) -> str:
        how = FOLDED
        for name in dict.fromkeys((role, "system")):
            try:
                chat = [{"role": name, "content": MARK}, {"role": "user", "content": "a"}]
                asked = self.template.render(chat, generation_prompt=True)
                # Some templates write the system message only if the user's message is the last.
                whole = self.template.render([*chat, {"role": "assistant", "content": "b"}])
                if MARK in asked and MARK in whole:
                    return name
                how = FOLDED_LATE if MARK in asked else how
            except TemplateRefuses:
                pass
        return how

    # -- spans ---------------------------------------------------------------------------------------------------------

    def _render(self, chat: _Chat, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        try:
            return self.template.render(messages, chat.tools, generation_prompt)
        except TemplateRefuses as refusal:
            for number, message in enumerate(messages):
                if message.get("tool_calls") and "tool_calls" not in self.template.text:
                    raise left_out(chat.where, message, number, "tool_calls") from None
            raise InputError(
                f"{chat.where}: the chat template refuses the messages ({refusal}); repair either"
            ) from None

    def _prompt_text(self, chat: _Chat, turn: int) -> str:
        """The prompt that asks for message ``turn``."""
        before = chat.messages[:turn]
        if (known := chat.rendered.get((turn, True))) is not None:
            return known
        if chat.prefill is None or turn != chat.first:
            return self._render(chat, before, generation_prompt=True)
        begun = self._render(chat, [*before, {"role": "assistant", "content": chat.prefill}])
        tail = self.template.tail
        if tail is None or not begun.endswith(tail):
            raise self._lost(chat, "the end of the assistant's words in the prompt")
        return begun[: len(begun) - len(tail)]

    def _turn(self, chat: _Chat, turn: int) -> _Turn:
        prompt = asking = self._prompt_text(chat, turn)
        known = chat.rendered.get((turn + 1, False))
        whole = self._render(chat, chat.messages[: turn + 1]) if known is None else known
        self._check_hidden(chat, whole, turn + 1)
        start = shown(prompt, whole, chat.hidden)
        if start is None:
            if chat.prefill is not None and turn == chat.first:
                raise self._lost(chat, "the assistant's words in the prompt")
            asked = self._render(chat, [*chat.messages[:turn], {"role": "assistant", "content": MARK}])
            prompt = asked.partition(MARK)[0]
            if MARK not in asked or not whole.startswith(prompt):
                raise self._lost(chat, f"the beginning of message {turn}")
            start = len(prompt)
            same = next((i for i, sign in enumerate(asking) if prompt[i : i + 1] != sign), len(asking))
            opening = asking[same:]
            # The response may repeat the opening, with other blanks after it.
            has = bool(opening.strip()) and whole[start:].lstrip().startswith(opening.strip())
            self.noted[TWICE if has else UNLIKE.format(json.dumps(opening, ensure_ascii=False))] += 1
        end, ended = self._end(whole, start)
        if end <= start:
            raise self._lost(chat, f"message {turn}")
        if chat.prefill is None or turn != chat.first:
            self._note_changes(chat.messages[turn], whole, start, end)
        return _Turn(prompt, whole, start, end, ended)

    def _end(self, whole: str, start: int) -> tuple[int, bool]:
        """Where the rendering's last turn ends, and whether a token ends it."""
        tail, token = self.template.tail, self.template.turn_end
        if tail is not None and whole.endswith(tail) and len(whole) - len(tail) >= start:
            content = len(whole) - len(tail)
            if token:
                return content + tail.index(token) + len(token), True
            return content + len(tail.rstrip()), False
        tokens = list(self.template.tokens.finditer(whole, start))
        if tokens and not whole[tokens[-1].end() :].strip():
            return tokens[-1].end(), True
        return len(whole.rstrip()), False

    def _note_changes(self, message: dict[str, Any], whole: str, start: int, end: int) -> None:
        text = (message["content"] or "").strip()
        self.turns += 1
        if text in whole[start:end]:
            return
        at = whole.find(text, max(0, start - len(text) + 1), end)  # the prompt may hold its beginning
        if at < 0:
            part = dropped_part(text, whole[start:end])
            if part:
                self.lost[part] += 1
            else:
                self.noted[CHANGED] += 1
        elif whole[at:start].strip():
            self.noted[TWICE] += 1

    def _found_again(self, chat: _Chat, turns: list[_Turn], spoken: list[str]) -> list[_Turn]:
        """The same turns in the last turn's rendering, in which the template changes the earlier ones."""
        whole, token = turns[-1].whole, self.template.turn_end
        starts = [*(shown(turn.prompt, whole, chat.hidden) for turn in turns[:-1]), turns[-1].start]
        found = []
        for turn, start, following, words in zip(turns, starts, starts[1:], spoken, strict=False):
            end = whole.find(token, start) if token and start is not None else -1
            if start is None or following is None:
                raise self._lost(chat, "the assistant's earlier turn, which the chat template changes,")
            if end >= 0 and end + len(token) <= following:
                found.append(_Turn(turn.prompt, whole, start, end + len(token), True))
                continue
            # The first end token belongs to a later turn: the template ends earlier turns with another token, as
            # Harmony's does. A policy must not learn that token, since sampling does not stop at it.
            other = self.template.earlier_end
            end = whole.find(words + other, start, following) + len(words)
            if not other or not words or end < start + len(words):
                raise self._lost(chat, "the end of the assistant's earlier turn, which the chat template changes,")
            found.append(_Turn(turn.prompt, whole, start, end, True))
            self.noted[ENDLESS] += 1
        return [*found, turns[-1]]

    def _joined(self, chat: _Chat, turns: list[_Turn]) -> Rendered:
        """One sequence of turns that all stand in the last turn's rendering."""
        last = turns[-1]
        pieces = [turns[0].prompt]
        for i, turn in enumerate(turns):
            if i:
                pieces.append(last.whole[turns[i - 1].end : turn.start])
            pieces.append(last.whole[turn.start : turn.end])
        if unhidden("".join(pieces), chat.hidden) != unhidden(last.whole[: last.end], chat.hidden):
            raise self._lost(chat, "the assistant's turns, one behind the other,")
        return Rendered(tuple(pieces), ended=last.ended, hidden=tuple(chat.hidden.items()))

    # -- nothing is left out without a word ----------------------------------------------------------------------------

    def _lost(self, chat: _Chat, what: str) -> InputError:
        remedy, names = "delete the row, or set data.chat_template to another", ", ".join(self.template.chosen)
        if names:
            remedy = f"data.chat_template_kwargs ({names}) may contradict the row: leave them out, {remedy}"
        return InputError(f"{chat.where}: {what} cannot be found in what the chat template renders; {remedy}")

    def _check_tools(self, messages: list[dict[str, Any]], tools: list[Any], where: str) -> None:
        if self._has_tools is None:
            try:
                with_tools = self.template.render(messages, tools, generation_prompt=True)
                self._has_tools = with_tools != self.template.render(messages, generation_prompt=True)
            except TemplateRefuses:
                return  # rendering the row's messages will report it
        if not self._has_tools:
            raise InputError(
                f"{where}: key 'tools': the chat template has no place for tools; set data.chat_template_name or "
                "data.chat_template to one that has, or delete the key"
            )

    def _check_hidden(self, chat: _Chat, rendered: str, count: int) -> None:
        """Refuses a row that spells special tokens which the template reacts to: they cannot stay text."""
        if not chat.hidden:
            return
        generation = count == chat.first and chat.prefill is None
        messages = [unhidden(message, chat.hidden) for message in chat.messages[:count]]
        plain = _Chat(chat.record, messages, unhidden(chat.tools, chat.hidden), chat.first, None, {})
        if not generation and chat.prefill is not None and count == chat.first:
            return
        if self._render(plain, messages, generation) != unhidden(rendered, chat.hidden):
            raise InputError(
                f"{chat.where}: spells {json.dumps(next(iter(chat.hidden.values())))}, which the chat template reads; "
                "set data.special_tokens to tokens, or take it out of the text"
            )
