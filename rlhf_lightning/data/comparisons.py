"""The forms of rows that compare answers: pairs, and several answers with ranks or ratings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_lightning.data.files import RawRow, kind_of
from rlhf_lightning.data.hints import renaming
from rlhf_lightning.data.messages import as_response, checked_messages, checked_prompt, checked_response, speaking
from rlhf_lightning.data.prompts import COMPARED, PROMPTS, agreeing_prompt, asked, demand, missing
from rlhf_lightning.data.rows import ASSISTANT, Form, Record, Row, is_empty, said
from rlhf_lightning.data.values import Message, Prompt, Response, checked_list, checked_number, checked_text

PREFERRED = ("preferred_output", "non_preferred_output")
GRADED = ("completions", "ranks", "ratings")


class Transcript(Form):
    """Two transcripts as in Anthropic's HH data. They are the same up to the last answer."""

    name, keys = "transcript", r"chosen+rejected as transcripts with '\n\nHuman:' and '\n\nAssistant:' turns"
    compared = transcript = True

    def matches(self, row: RawRow) -> bool:
        """Whether it has both sides, neither is a list, and no key could hold their prompt."""
        sides = [row[key] for key in COMPARED if key in row]
        lists = any(isinstance(side, list | dict) for side in sides)
        return len(sides) == 2 and not lists and not any(key in row for key in PROMPTS)

    def read(self, row: Row) -> Record | None:
        """Cuts both transcripts before their last answer: prompt and response."""
        texts = [checked_text(row.take(key), row.where, key) for key in COMPARED]
        for key, text in zip(COMPARED, texts, strict=True):
            if ASSISTANT not in text and "prompt" in row.null:
                raise missing(row, "prompt", COMPARED)
            if ASSISTANT not in text:
                problem = "there is no key 'prompt', and the text has no '\\n\\nAssistant:' turn"
                hint = renaming(row.columns, ["prompt"], row.option)
                remedy = hint or "add the prompt, or write it as a transcript"
                raise row.refused(key, f"{problem}; {remedy}")
        (prompt, better), (other, worse) = map(_before_last_answer, texts)
        if prompt != other:
            row.drop("transcripts that differ before their last answer")
            return None
        return _pair(self, row, prompt, better, worse)


class ChatPair(Form):
    """Two whole conversations. Their common beginning is the prompt; the rest of each is a response."""

    name, keys = "chat pair", "chosen+rejected as chat messages"
    compared = True

    def matches(self, row: RawRow) -> bool:
        """Whether both sides are lists, and either one holds the prompt too, or no other key could hold it."""
        sides = [row.get(key) for key in COMPARED]
        if not all(isinstance(side, list) for side in sides):
            return False
        return any(map(_asks, sides)) or not any(key in row for key in PROMPTS)

    def read(self, row: Row) -> Record | None:
        """Splits the conversations at the message in which they differ."""
        given = {key: row.take(key) for key in COMPARED}
        chosen, rejected = (checked_messages(side, row.where, key, len(side)) for key, side in given.items())
        for key, messages in zip(COMPARED, (chosen, rejected), strict=True):
            if messages[-1].role != "assistant":
                raise row.refused(key, f"the last message is from '{messages[-1].role}'; end with the assistant's")
        if len(chosen) == len(rejected) == 1:
            raise row.refused("prompt", "is missing, and chosen and rejected hold the answers alone; add it")
        cut = _parting(chosen, rejected)
        if not cut:
            raise row.refused(
                "rejected", "the conversations differ before the first answer; make them the same up to it"
            )
        for key, side in given.items():  # again, now that the learnt messages are known: their marks must agree
            checked_messages(side, row.where, key, context=cut)
        agreeing_prompt(row, chosen)
        return _pair(self, row, chosen[:cut], as_response(chosen[cut:]), as_response(rejected[cut:]))


class Pair(Form):
    """A better and a worse answer to a prompt."""

    name, keys = "pair", "prompt+chosen+rejected"
    compared = True

    def matches(self, row: RawRow) -> bool:
        """Whether it has either side."""
        return any(key in row for key in COMPARED)

    def read(self, row: Row) -> Record | None:
        """Reads prompt and answers, each as text or messages."""
        demand(row, COMPARED, ("prompt",))
        prompt = asked(row, ("chosen", "rejected"))
        chosen, rejected = (checked_response(row.take(key), row.where, key) for key in COMPARED)
        return _pair(self, row, prompt, chosen, rejected)


class _Graded(Form):
    """Several answers with a number each. Every two answers with different numbers make a pair."""

    compared = True
    by: str
    sign: int  # 1 if a lower number is better, -1 if a higher one is

    def read(self, row: Row) -> Record | None:
        """Sorts the responses best first, and makes every pair that is no tie."""
        for key in ("completions", self.by):
            if key not in row:
                both = key == "ranks" and not any(name in row for name in ("ranks", "ratings"))
                raise missing(row, "ranks' or 'ratings" if both else key, GRADED)
        prompt = asked(row, GRADED)
        completions = checked_list(row.take("completions"), row.where, "completions")
        answers = [checked_response(item, row.where, f"completions[{i}]") for i, item in enumerate(completions)]
        listed = checked_list(row.take(self.by), row.where, self.by)
        grades = [checked_number(grade, row.where, f"{self.by}[{i}]") for i, grade in enumerate(listed)]
        if len(answers) < 2:
            raise row.refused("completions", f"holds {len(answers)}; a comparison needs at least 2")
        if len(grades) != len(answers):
            raise row.refused(self.by, f"holds {len(grades)} for {len(answers)} completions; give one for each")
        self.check(row, grades)
        order = sorted(range(len(answers)), key=lambda i: self.sign * grades[i])
        usable = [i for i in order if not is_empty(answers[i])]
        pairs = []
        for place, i in enumerate(order):
            for j in order[place + 1 :]:
                if grades[i] == grades[j]:
                    row.drop("ties")
                elif _usable_pair(row, answers[i], answers[j]):
                    pairs.append((usable.index(i), usable.index(j)))
        record = row.record(self, prompt, [answers[i] for i in usable], pairs)
        return record if usable else None

    def check(self, row: Row, grades: Sequence[float]) -> None:
        """Refuses grades that are invalid."""


class Rating(_Graded):
    """Several answers with a rating each; more is better."""

    name, keys = "rating", "prompt+completions+ratings"
    by, sign = "ratings", -1

    def matches(self, row: RawRow) -> bool:
        """Whether it has ratings."""
        return "ratings" in row

    def check(self, row: Row, grades: Sequence[float]) -> None:
        """Refuses a row that has ranks, too."""
        if "ranks" in row:
            raise row.refused("ratings", "stands beside 'ranks'; keep one of them")


class Ranking(_Graded):
    """Several answers with a rank each; 1 is best, equal ranks are ties."""

    name, keys = "ranking", "prompt+completions+ranks"
    by, sign = "ranks", 1

    def matches(self, row: RawRow) -> bool:
        """Whether it has ranks, or completions without any grade."""
        return "completions" in row or "ranks" in row

    def check(self, row: Row, grades: Sequence[float]) -> None:
        """Refuses numbers that are no ranks."""
        for grade in grades:
            if grade < 1 or grade != int(grade):
                raise row.refused("ranks", f"must be whole numbers from 1 (best), got {grade:g}; equal ones are ties")


class StackPair(Form):
    """A pair as in TRL's StackExchange data. Response j was preferred."""

    name, keys = "question pair", "question+response_j+response_k"
    compared = True

    def matches(self, row: RawRow) -> bool:
        """Whether it has either response."""
        return "response_j" in row or "response_k" in row

    def read(self, row: Row) -> Record | None:
        """Reads the question and both responses."""
        demand(row, ("question", "response_j", "response_k"))
        question = checked_prompt(row.take("question"), row.where, "question")
        better, worse = (checked_response(row.take(key), row.where, key) for key in ("response_j", "response_k"))
        return _pair(self, row, question, better, worse)


class PreferencePair(Form):
    """A pair as in OpenAI's preference data: the conversation so far with its tools, and an answer of each kind."""

    name, keys = "preference", "input (messages)+preferred_output+non_preferred_output"
    compared = True

    def matches(self, row: RawRow) -> bool:
        """Whether it has either answer."""
        return any(key in row for key in PREFERRED)

    def read(self, row: Row) -> Record | None:
        """Reads the conversation and both answers. Other keys of the input become columns."""
        demand(row, ("input", *PREFERRED))
        given = row.take("input")
        if not isinstance(given, dict) or "messages" not in given:
            problem = "must be an object with messages" + ("" if isinstance(given, dict) else f", got {kind_of(given)}")
            raise row.refused("input", f"{problem}; repair or delete the row")
        listed = checked_list(given["messages"], row.where, "input.messages")
        prompt = checked_prompt(listed, row.where, "input.messages")
        better, worse = (checked_response(row.take(key), row.where, key) for key in PREFERRED)
        row.tools = given.get("tools")
        row.columns = {**{key: given[key] for key in given if key not in ("messages", "tools")}, **row.columns}
        return _pair(self, row, prompt, better, worse)


def _before_last_answer(transcript: str) -> tuple[str, str]:
    cut = transcript.rindex(ASSISTANT) + len(ASSISTANT)
    return transcript[:cut], transcript[cut:]


def _asks(side: Any) -> bool:
    """Whether a list of messages begins with a message other than the assistant's, and so holds the prompt."""
    first = side[0] if side else None
    return isinstance(first, dict) and speaking(first.get("role", first.get("from"))) != "assistant"


def _parting(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages belong to the common prompt: the last place where both go on with an answer."""
    shortest = min(len(chosen), len(rejected)) - 1
    cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    while cut and not (chosen[cut].role == rejected[cut].role == "assistant" and chosen[cut - 1].role != "assistant"):
        cut -= 1
    return cut


def _pair(form: Form, row: Row, prompt: Prompt, better: Response, worse: Response) -> Record | None:
    p = _preference(row)
    if p < 0.5:  # the row is the other way round
        better, worse, p = worse, better, 1.0 - p
        row.note("pair with a preference below 0.5, taken the other way round")
    record = row.record(form, prompt, (better, worse), ((0, 1),))
    if record.margin > 0 and p < 1:
        raise row.refused("margin", "stands beside 'preference', which says how sure the order is; keep one of them")
    return replace(record, preference=p) if _usable_pair(row, better, worse) else None


def _preference(row: Row) -> float:
    """The probability that ``chosen`` is preferred; 1 if the row does not say."""
    value = row.take("preference")
    if value is None:
        return 1.0
    p = checked_number(value, row.where, "preference")
    if not 0 <= p <= 1:
        raise row.refused("preference", f"is {p:g}; give the probability from 0 to 1 that 'chosen' is preferred")
    return p


def _usable_pair(row: Row, better: Response, worse: Response) -> bool:
    if is_empty(better) or is_empty(worse):
        row.drop("empty response")
        return False
    if said(better) == said(worse):
        row.drop("equal responses")
        return False
    return True
