"""The forms that rows may have. One class per form says which keys mark it, what reports call it, and how to read it.

The first form in ``FORMS`` that matches a row reads it. Keys that the form does not take become columns for reward
functions. Texts are kept byte for byte.
"""

from __future__ import annotations

from rlhf_lightning.data.columns import KEYS
from rlhf_lightning.data.comparisons import (
    GRADED,
    ChatPair,
    Pair,
    PreferencePair,
    Ranking,
    Rating,
    StackPair,
    Transcript,
)
from rlhf_lightning.data.files import RawRow, kind_of
from rlhf_lightning.data.messages import as_response, checked_messages, checked_response
from rlhf_lightning.data.prompts import COMPARED, NULL, PROMPTS, agreeing_prompt, asked, instruction, missing
from rlhf_lightning.data.refusals import ACCEPTED
from rlhf_lightning.data.rows import Form, Record, Row, is_empty
from rlhf_lightning.data.values import Prompt, Response, checked_text
from rlhf_lightning.errors import InputError


class Chat(Form):
    """A conversation. Its last assistant message is the response; if someone else speaks last, it is a prompt."""

    name, keys = "chat", "messages (role, content)"
    conversation = True
    key = "messages"

    def matches(self, row: RawRow) -> bool:
        """Whether it has the list of messages."""
        return self.key in row

    def read(self, row: Row) -> Record | None:
        """Splits the turns into the prompt and the last answer, which is labelled if the row has a label."""
        if "completion" in row:
            raise row.refused(self.key, "stands beside 'completion'; keep one of the two forms")
        given = row.take(self.key)
        judged = "label" in row and isinstance(given, list)  # then only the last answer is learnt
        messages = checked_messages(given, row.where, self.key, context=len(given) if judged else 0)
        agreeing_prompt(row, messages)
        cut = len(messages)
        while cut and messages[cut - 1].role == "assistant":
            cut -= 1
        if judged:
            checked_messages(given, row.where, self.key, context=cut)
        if not cut:
            raise row.refused(self.key, "holds an answer without the message it answers; add the user's")
        if cut == len(messages):
            return row.record(self, messages)
        return _answered(self, row, messages[:cut], as_response(messages[cut:]))


class ShareGPT(Chat):
    """A conversation under ShareGPT's key, most often with from and value."""

    name, keys = "sharegpt", "conversations (from, value)"
    key = "conversations"


class Demonstration(Form):
    """A response to imitate; or, with a label, a response that was judged on its own."""

    name, keys = "demonstration", "prompt+completion"

    def matches(self, row: RawRow) -> bool:
        """Whether it has a completion."""
        return "completion" in row

    def read(self, row: Row) -> Record | None:
        """Reads prompt and completion, each as text or messages."""
        prompt = asked(row, ("completion",))
        return _answered(self, row, prompt, checked_response(row.take("completion"), row.where, "completion"))


class Labelled(Demonstration):
    """A response that was judged on its own. Any row with one response is read as this form if it has a label."""

    name, keys = "labelled", "prompt+completion+label"
    labelled = True


class Alpaca(Form):
    """An instruction, perhaps with an input, and its output. The prompt is the instruction, a line break, the input."""

    name, keys = "alpaca", "instruction[+input]+output"
    output, input = "output", "input"

    def matches(self, row: RawRow) -> bool:
        """Whether it has an instruction with its output."""
        return "instruction" in row and self.output in row

    def read(self, row: Row) -> Record | None:
        """Joins instruction and input to the prompt, and reads the output."""
        prompt = instruction(row, self.input)
        return _answered(self, row, prompt, checked_response(row.take(self.output), row.where, self.output))


class Dolly(Alpaca):
    """Alpaca's form under the key names of Dolly."""

    name, keys = "dolly", "instruction[+context]+response"
    output, input = "response", "context"


class Text(Form):
    """A text without a prompt, learnt as a whole."""

    name, keys = "text", "text"
    whole = True

    def matches(self, row: RawRow) -> bool:
        """Whether it has a text and no prompt."""
        return "text" in row and not any(key in row for key in PROMPTS)

    def read(self, row: Row) -> Record | None:
        """Reads the text as a response to an empty prompt."""
        return _answered(self, row, "", checked_text(row.take("text"), row.where, "text"))


class PromptAlone(Form):
    """A prompt to answer."""

    name, keys = "prompt", "prompt"

    def matches(self, row: RawRow) -> bool:
        """Whether it has a prompt, or an instruction without its output."""
        return "prompt" in row or "instruction" in row

    def read(self, row: Row) -> Record | None:
        """Reads the prompt, as text or messages."""
        if "instances" in row and "prompt" not in row:
            problem = "holds several inputs and outputs; write a row with instruction, input and output for each"
            raise row.refused("instances", problem)
        return row.record(self, asked(row, ()))


LABELLED, DEMONSTRATION = Labelled(), Demonstration()
FORMS: tuple[Form, ...] = (
    Transcript(),
    ChatPair(),
    Pair(),
    Rating(),
    Ranking(),
    StackPair(),
    PreferencePair(),
    Chat(),
    ShareGPT(),
    DEMONSTRATION,
    LABELLED,
    Alpaca(),
    Dolly(),
    Text(),
    PromptAlone(),
)


def is_known(row: RawRow) -> bool:
    """Whether a row matches any form."""
    return any(form.matches(row) for form in FORMS)


def read_row(row: Row) -> Record | None:
    """Reads the row by the first form that it matches. None if the row is dropped; the reason is counted.

    Raises:
        InputError: the row matches no form, or cannot be read as the form that it matches.
    """
    compared = [key for key in COMPARED if key in row]
    graded = [key for key in GRADED if key in row]
    if compared and graded:
        raise row.refused(graded[0], "stands beside 'chosen' and 'rejected'; keep one form of comparison")
    form = next((form for form in FORMS if form.matches(row.values)), None)
    if form is not None:
        return form.read(row)
    if row.null and is_known({**row.values, **dict.fromkeys(row.null)}):
        raise row.refused(next(key for key in row.null if key in KEYS), NULL)
    error = missing(row, "prompt", ("prompt", "completion", "chosen", "rejected", "messages", *GRADED))
    raise InputError(f"{error}{ACCEPTED}")


def _answered(form: Form, row: Row, prompt: Prompt, response: Response) -> Record | None:
    """The record of a prompt with one response, labelled if the row has a label."""
    if not form.whole and "label" in row:
        form = LABELLED
        row.columns["label"] = _label(row)
    record = row.record(form, prompt, (response,))
    if not is_empty(response):
        return record
    row.drop("empty response")
    return None


def _label(row: Row) -> bool:
    value = row.values["label"]
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower(), value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    got = f"got {value}" if isinstance(value, int | float) else f"got {kind_of(value)}"
    raise row.refused("label", f"must be true (a response to give) or false, {got}; repair it, or rename the key")
