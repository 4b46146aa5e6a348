"""Advice about rows that can be read but look wrong: few distinct prompts, or columns likely meant for training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rlhf_lightning.data.files import shown
from rlhf_lightning.data.hints import COLUMNS, meant
from rlhf_lightning.data.rows import Record

_FEW = 50  # rows for each prompt, on average; above this the real prompt probably stands in another column
# Columns that some form or another library reads. Where the row's form does not read them, only rewards get them.
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
_BESIDE = ("margin", "preference", "weight", "system", "tools")  # what may stand beside any form
_WANTED = ("completion", "chosen", "rejected", "completions", "ranks", "ratings", *_BESIDE)

# The beginning of a list of messages that a program wrote as text: as JSON, or as Python prints it.
_WRITTEN = re.compile(r"\s*\[?\s*\{\s*(['\"])(role|from|content|value)\1\s*:")
_SPEAKS = re.compile(r"(['\"])(role|from)\1\s*:\s*(['\"])(user|assistant|system|human|gpt)\3")


def advice(records: Sequence[Record], option: str = COLUMNS) -> list[str]:
    """One line for each thing to look at; the lines name ``option`` as the option that renames columns."""
    lines = [*repeating(records), *written_out(records), *_unanswered(records), *one_sided(records)]
    prompts = len({record.key for record in records})
    if len(records) > _FEW * prompts:
        share = f"{len(records):,} rows have {prompts:,} distinct prompt{'s' * (prompts > 1)}"
        lines.append(f"{share}; is the text to answer in another column? {_naming('prompt', 'NAME', option)} takes it")
    counts = Counter(
        name for record in records for name in record.columns if not (record.form.labelled and name == "label")
    )
    misspelt = {given: name for given, name in _misread(records, _WANTED).items() if given not in _KNOWN}
    # Rows without responses may have their answers in a column of another name.
    misspelt |= _misread([record for record in records if not record.responses], _ANSWERS)
    if not any(record.form.labelled for record in records):
        misspelt |= _misread([record for record in records if len(record.responses) == 1], ["label"])
    for name, count in counts.items():
        if name in misspelt:
            lines.append(_hint(name, misspelt[name], count, option))
        elif name in _KNOWN or name in _ANSWERS:
            unused = "is not used in training; only rewards get it"
            lines.append(f"column '{shown(name)}' of {count:,} rows {unused}")
    return lines


def for_training(records: Sequence[Record], labels: bool = False) -> list[str]:
    """The part of the advice that a training run shows. It leaves out columns that may be meant for rewards.

    ``labels``: whether the run learns from labels.
    """
    counts = Counter(name for record in records for name in record.columns)
    misread = _misread(records, _BESIDE)
    hints = [_hint(given, name, counts[given], COLUMNS) for given, name in misread.items()]
    return [*repeating(records), *written_out(records), *hints, *(one_sided(records) if labels else [])]


def _misread(records: Sequence[Record], wanted: Sequence[str]) -> dict[str, str]:
    """Maps each column to the key that was likely meant. Leaves out columns of rows that have that key as well."""
    columns = dict.fromkeys(name for record in records for name in record.columns)
    found = {given: name for name, given in meant(columns, wanted).items() if given != name}
    both = {
        given for r in records for given, name in found.items() if given in r.columns and r.raw.get(name) is not None
    }
    return {given: name for given, name in found.items() if given not in both}


def _hint(given: str, name: str, count: int, option: str) -> str:
    does = _naming(name, shown(given), option)
    return f"column '{shown(given)}' of {count:,} rows looks like '{name}', but is not read as it; {does} does so"


def repeating(records: Sequence[Record]) -> list[str]:
    """A line if most responses begin with their own prompt: training would learn the prompt as part of the response."""
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
        "take it off the responses (for two transcripts, delete the column 'prompt': their common beginning is used)"
    ]


def written_out(records: Sequence[Record]) -> list[str]:
    """A line if texts are lists of messages written as text: their quotes and braces would be learnt."""
    texts = [[text for text in (r.prompt, *r.responses) if isinstance(text, str)] for r in records]
    count = sum(any(_WRITTEN.match(text) and _SPEAKS.search(text) for text in row) for row in texts)
    if not count:
        return []
    return [
        f"messages are written as text in {count:,} of {len(records):,} rows, and stay text with their quotes and "
        "braces; give lists of messages (in CSV and Parquet, lists that json.dumps wrote are read as lists)"
    ]


def one_sided(records: Sequence[Record]) -> list[str]:
    """A line if all labels are the same: there is no contrast to learn from."""
    labels = [record.desirable for record in records if record.form.labelled]
    if len(set(labels)) != 1:
        return []
    given, other = ("true", "false") if labels[0] else ("false", "true")
    return [
        f"every label ({len(labels):,}) is {given}, so KTO has no contrast to learn from; add rows of label {other}"
    ]


def _unanswered(records: Sequence[Record]) -> list[str]:
    """A line if conversations end without an answer: supervised fine-tuning would refuse them."""
    conversations = [record for record in records if record.form.conversation]
    count = sum(not record.responses for record in conversations)
    if not count:
        return []
    return [
        f"{count:,} of {len(conversations):,} conversations end without the assistant's answer: they serve as prompts "
        "alone (PPO, GRPO, evaluate, predict); for SFTModule add the answers, or take the last turns off"
    ]


def _naming(name: str, given: str, option: str) -> str:
    """The option, as the user writes it, that makes column ``given`` be read as ``name``."""
    return f"{option}: {{{name}: {given}}}" if option == COLUMNS else f"{option} {name}={given}"
