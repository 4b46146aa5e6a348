"""What looks wrong with rows that can all be read: few prompts, and columns that were likely meant for training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rlhf_lightning.data.files import shown
from rlhf_lightning.data.hints import COLUMNS, meant
from rlhf_lightning.data.rows import Record

_FEW = 50  # rows a prompt on average, from which on it looks as if the real prompt stood in another column
# Columns that mean something where a form reads them, or in other libraries; elsewhere rewards alone are handed them.
_KNOWN = (
    *("system", "tools", "input", "instruction", "context", "history", "text", "messages", "conversations", "question"),
    *(
        "output",
        "response",
        "responses",
        "label",
        "score",
        "scores",
        "score_chosen",
        "score_rejected",
        "images",
        "image",
    ),
)
_ANSWERS = ("chosen", "rejected", "completions", "ratings", "ranks", "completion")
_BESIDE = ("margin", "weight", "system", "tools")  # what may stand beside any form
_WANTED = ("completion", "chosen", "rejected", "completions", "ranks", "ratings", *_BESIDE)

# The beginning of messages that a program has written as text, in JSON or as Python's print does.
_WRITTEN = re.compile(r"\s*\[?\s*\{\s*(['\"])(role|from|content|value)\1\s*:")
_SPEAKS = re.compile(r"(['\"])(role|from)\1\s*:\s*(['\"])(user|assistant|system|human|gpt)\3")


def advice(records: Sequence[Record], option: str = COLUMNS) -> list[str]:
    """One line for each thing to look at; ``option`` is what gives columns other names, for messages."""
    lines = [*repeating(records), *written_out(records), *_unanswered(records), *one_sided(records)]
    prompts = len({record.key for record in records})
    if len(records) > _FEW * prompts:
        share = f"{len(records):,} rows have {prompts:,} distinct prompt{'s' * (prompts > 1)}"
        lines.append(f"{share}; is the text to answer in another column? {_naming('prompt', 'NAME', option)} takes it")
    counts = Counter(
        name for record in records for name in record.columns if not (record.form.labelled and name == "label")
    )
    misspelt = {given: name for given, name in _misread(records, _WANTED).items() if given not in _KNOWN}
    # Of prompts alone, a column that has the answers under another name is what training would look for.
    misspelt |= _misread([record for record in records if not record.responses], _ANSWERS)
    if not any(record.form.labelled for record in records):
        misspelt |= _misread([record for record in records if len(record.responses) == 1], ["label"])
    for name, count in counts.items():
        if name in misspelt:
            lines.append(_hint(name, misspelt[name], count, option))
        elif name in _KNOWN or name in _ANSWERS:
            unused = "is not used in training, where rewards alone are handed it"
            lines.append(f"column '{shown(name)}' of {count:,} rows {unused}")
    return lines


def for_training(records: Sequence[Record], labels: bool = False) -> list[str]:
    """What of it a training says: it tells which rows it reads by itself, and columns may be meant for rewards.

    ``labels``: whether it learns from them.
    """
    counts = Counter(name for record in records for name in record.columns)
    misread = _misread(records, _BESIDE)
    hints = [_hint(given, name, counts[given], COLUMNS) for given, name in misread.items()]
    return [*repeating(records), *written_out(records), *hints, *(one_sided(records) if labels else [])]


def _misread(records: Sequence[Record], wanted: Sequence[str]) -> dict[str, str]:
    """Columns that were likely meant for other keys, with these; not where a row has both, and so cannot take one."""
    columns = dict.fromkeys(name for record in records for name in record.columns)
    found = {given: name for name, given in meant(columns, wanted).items() if given != name}
    both = {
        given for r in records for given, name in found.items() if given in r.columns and r.raw.get(name) is not None
    }
    return {given: name for given, name in found.items() if given not in both}


def _hint(given: str, name: str, count: int, option: str) -> str:
    does = _naming(name, shown(given), option)
    return f"column '{shown(given)}' of {count:,} rows looks like '{name}', which it is not read as; {does} does"


def repeating(records: Sequence[Record]) -> list[str]:
    """A line where most responses begin with their own prompt, which would be learnt as a part of them; else none."""
    texts = [
        (record.prompt.strip(), response.lstrip())
        for record in records
        if isinstance(record.prompt, str) and record.prompt.strip()
        for response in record.responses
        if isinstance(response, str)
    ]
    count = sum(response.startswith(prompt) for prompt, response in texts)
    if 2 * count <= len(texts):
        return []
    return [
        f"{count:,} of {len(texts):,} responses begin with their own prompt, which would be learnt as a part of them; "
        "take it off the responses (of two transcripts, delete the column 'prompt': what both begin with is the prompt)"
    ]


def written_out(records: Sequence[Record]) -> list[str]:
    """A line where texts are messages that were written as text, so that their quotes and braces would be learnt."""
    texts = [[text for text in (r.prompt, *r.responses) if isinstance(text, str)] for r in records]
    count = sum(any(_WRITTEN.match(text) and _SPEAKS.search(text) for text in row) for row in texts)
    if not count:
        return []
    return [
        f"messages are written as text in {count:,} of {len(records):,} rows, and stay text, quotes and braces with "
        "it; give lists of messages (in CSV and Parquet, text that json.dumps writes of them is read as such)"
    ]


def one_sided(records: Sequence[Record]) -> list[str]:
    """A line where labels are all the same, so that there is no contrast to learn from; else none."""
    labels = [record.desirable for record in records if record.form.labelled]
    if len(set(labels)) != 1:
        return []
    given, other = ("true", "false") if labels[0] else ("false", "true")
    return [
        f"every label ({len(labels):,}) is {given}, so KTO has no contrast to learn from; add rows of label {other}"
    ]


def _unanswered(records: Sequence[Record]) -> list[str]:
    """A line where conversations end without an answer: as data for supervised fine-tuning they would be refused."""
    conversations = [record for record in records if record.form.conversation]
    count = sum(not record.responses for record in conversations)
    if not count:
        return []
    return [
        f"{count:,} of {len(conversations):,} conversations end without the assistant's answer: they serve as prompts "
        "alone (PPO, GRPO, evaluate, predict); for SFTModule add the answers, or take the last turns off"
    ]


def _naming(name: str, given: str, option: str) -> str:
    """The option that reads ``given`` as ``name``."""
    return f"{option}: {{{name}: {given}}}" if option == COLUMNS else f"{option} {name}={given}"
