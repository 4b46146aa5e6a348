"""Checks that a resumed run has the same data as its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import InputError


def check_resumed(saved: Mapping[str, Any], now: Mapping[str, Any], fingerprint: str, encoding: str, rows: int) -> None:
    """Refuses rows, tokens or batch options that differ from the checkpoint's.

    Args:
        saved: the checkpoint's state of the data, see `PreferenceDataModule.state_dict`.
        now: the run's options by name.
        fingerprint: the digest of the run's rows.
        encoding: the digest of their tokens.
        rows: the number of rows to train on.

    Raises:
        InputError: names what differs.
    """
    then = saved["options"]
    if then["view"] != now["view"]:
        raise InputError(
            f"--ckpt_path: its training learnt from {then['view']}, and this one learns from {now['view']}: it is of "
            "another method; start from its exported model with --model.model"
        )
    for name, value in now.items():
        if then.get(name) != value:
            raise InputError(
                f"data.{name}: the checkpoint was made with {then.get(name)}, now it is {value}; set it back to "
                "resume, or start a new run from the exported model"
            )
    if saved["fingerprint"] != fingerprint:
        raise InputError(
            f"data.path: the data changed since the checkpoint ({saved['rows']} {now['view']} then, {rows} now); "
            "restore the files to resume, or start a new run from the exported model"
        )
    if saved["encoding"] != encoding:
        raise InputError(
            "data.tokenizer: the rows give other tokens than when the checkpoint was made; restore the tokenizer or "
            "the chat template to resume, or start a new run from the exported model"
        )
