"""Writes the responses of ``predict`` as a JSONL file: one line for each row of the data, in the order of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.collectives import all_gather_objects, failing_together
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.data.kept_columns import free_names, prompt_value, written
from rlhf_lightning.data.records import Record
from rlhf_lightning.data.summary import counts_text
from rlhf_lightning.outputs import write_whole
from rlhf_lightning.text import say

_OURS = ("row", "where", "prompt", "response", "tokens", "truncated")


class PredictionWriter(Callback):
    """Collects the rows that ``predict_step`` returns, on all processes, and writes them once at the end.

    A line has ``row`` (the number of the row in its file, from 0), ``where`` (its file and line, as in messages),
    ``prompt`` (as in the data: text, or the messages up to the one to answer), ``response``, ``tokens`` (the number of
    tokens in the response, EOS included), ``truncated`` (no EOS came), and then the row's other columns. A column with
    one of these names is written as ``input_NAME``.

    Args:
        path: the file to write. The file is complete as soon as it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._records: dict[int, dict[str, Any]] = {}  # by number: the parts of a row's line without the answer
        self._left_out = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints how many rows will be answered, and refuses columns that cannot be written before the work begins.

        Raises:
            InputError: a column holds a value that JSON cannot express.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PreferenceDataModule):
            return
        if trainer.is_global_zero:
            say(data.summary().replace("data: ", f"{'data':<10}"))
            if data.dropped:
                self._left_out = counts_text(data.dropped, {})
        with failing_together():
            if trainer.is_global_zero:
                records = [example.record for example in data.held_out]
                names = free_names({name for record in records for name in _others(record)}, _OURS)
                for old, new in names.items():
                    if old != new:
                        say(f"{'':<10}column {old!r} is written as {new!r}")
                self._records = {record.number: _known(record, names) for record in records}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Collects the batch's rows."""
        self._rows += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the rows on the first process, which writes them in the order of the whole prompt set."""
        rows = [row for part in all_gather_objects(self._rows) for row in part]
        if not trainer.is_global_zero:
            return
        rows.sort(key=lambda row: row["row"])
        lines = [self._line(row) for row in rows]
        write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        say(f"{len(rows):,} responses in {self.path}" + (f" ({self._left_out})" if self._left_out else ""))

    def _line(self, row: dict[str, Any]) -> dict[str, Any]:
        known = self._records.get(row["row"])
        if known is None:
            return row
        first = {name: known[name] for name in ("row", "where", "prompt")}
        return {**first, **{name: value for name, value in row.items() if name not in first}, **known["columns"]}


def _known(record: Record, names: dict[str, str]) -> dict[str, Any]:
    columns = written(record, _others(record), names)
    return {"row": record.row, "where": record.where, "prompt": prompt_value(record), "columns": columns}


def _others(record: Record) -> dict[str, Any]:
    """The row's other keys, responses included, without the key that was read as the prompt."""
    prompt, columns = prompt_value(record), record.columns
    return {k: value for k, value in record.raw.items() if k in columns or (k != "prompt" and value != prompt)}


def inputs_of(data: Any, model: str | None) -> list[str]:
    """The files and folders that a run reads, from the parsed options of its DataModule. No output may replace them.

    Args:
        data: a namespace with the options that name files; each may be missing, None, one path or several.
        model: the model's folder.
    """
    found = [model]
    for key in ("path", "val_path", "chat_template", "tokenizer"):
        given = data.get(key)
        found += [given] if isinstance(given, str) else list(given or [])
    return [str(item) for item in found if item is not None]
