"""A peft adapter's folder in place of a model's: loads its base model and adds the adapter to the weights."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.folders import find, read_json

_CONFIG = "adapter_config.json"


def base_of(path: str | Path) -> str | None:
    """The folder or hub name of the model that an adapter belongs to; None where ``path`` is no adapter's folder.

    Raises:
        InputError: the base is not there, or the adapter does not name it.
    """
    folder = Path(path).expanduser()
    if not (folder / _CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    base = read_json(folder / _CONFIG).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{path}: an adapter that does not name its model: set base_model_name_or_path in {_CONFIG}")
    beside = folder / base  # as it is written where both were moved together
    try:
        return str(beside) if (beside / "config.json").is_file() else find(base)
    except InputError as error:
        raise InputError(f"{path}: an adapter, and its base_model_name_or_path is not there: {error}") from None


def merge(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The model with the folder's adapter added to its weights.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"{path}: an adapter, which needs peft; run: pip install 'rlhf-lightning[lora]'") from None
    _say_merged(str(path), model.name_or_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about names
        adapted: Any = PeftModel.from_pretrained(model, str(Path(path).expanduser()))
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.requires_grad_(True)


@cache
def _say_merged(path: str, base: str) -> None:
    """Said once, even where several models of a run are loaded from one folder."""
    warnings.warn(f"{path}: an adapter; its model {base} has it added to its weights", stacklevel=2)
