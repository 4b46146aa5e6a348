"""Whether the data of a run are those of the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import InputError


def check_resumed(made: Mapping[str, Any], now: Mapping[str, Any], fingerprint: str, encoding: str, rows: int) -> None:
    """Refuse other rows, other tokens, and other options of the batches.

    Args:
        made: what the checkpoint says of the data, see `PreferenceDataModule.state_dict`.
        now: the options by name.
        fingerprint: of the rows.
        encoding: of their tokens.
        rows: how many there are to train on.

    Raises:
        InputError: names what differs.
    """
    then = made["options"]
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
    if made["fingerprint"] != fingerprint:
        raise InputError(
            f"data.path: the data changed since the checkpoint ({made['rows']} {now['view']} then, {rows} now); "
            "restore the files to resume, or start a new run from the exported model"
        )
    if made["encoding"] != encoding:
        raise InputError(
            "data.tokenizer: the rows give other tokens than when the checkpoint was made; restore the tokenizer or "
            "the chat template to resume, or start a new run from the exported model"
        )
