"""What looks wrong with rows that can all be read: few prompts, and columns that were likely meant for training."""

from __future__ import annotations

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
_WANTED = ("completion", "chosen", "rejected", "completions", "ranks", "ratings", "margin", "weight", "system", "tools")


def advice(records: Sequence[Record], option: str = COLUMNS) -> list[str]:
    """One line for each thing to look at; ``option`` is what gives columns other names, for messages."""
    lines = repeating(records)
    prompts = len({record.key for record in records})
    if len(records) > _FEW * prompts:
        share = f"{len(records):,} rows have {prompts:,} distinct prompt{'s' * (prompts > 1)}"
        lines.append(f"{share}; is the text to answer in another column? {_naming('prompt', 'NAME', option)} takes it")
    counts = Counter(
        name for record in records for name in record.columns if not (record.form.labelled and name == "label")
    )
    misspelt = {given: name for name, given in meant(counts, _WANTED).items() if given not in _KNOWN}
    # Of prompts alone, a column that has the answers under another name is what training would look for.
    alone = dict.fromkeys(name for record in records if not record.responses for name in record.columns)
    misspelt |= {given: name for name, given in meant(alone, _ANSWERS).items()}
    judged = dict.fromkeys(name for record in records if len(record.responses) == 1 for name in record.columns)
    if not any(record.form.labelled for record in records):
        misspelt |= {given: name for name, given in meant(judged, ["label"]).items()}
    for name, count in counts.items():
        if name in misspelt:
            given = misspelt[name]
            what = f"looks like '{given}', which it is not read as; {_naming(given, shown(name), option)} does"
        elif name in _KNOWN:
            what = "is not used in training, where rewards alone are handed it"
        else:
            continue
        lines.append(f"column '{shown(name)}' of {count:,} rows {what}")
    return lines


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


def _naming(name: str, given: str, option: str) -> str:
    """The option that reads ``given`` as ``name``."""
    return f"{option}: {{{name}: {given}}}" if option == COLUMNS else f"{option} {name}={given}"
