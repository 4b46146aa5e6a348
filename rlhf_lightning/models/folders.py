"""Finds a model's folder and looks into it before anything is loaded, so that a mistyped path is reported at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants, errors
from safetensors import safe_open
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.text import alike

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)")
_PATIENCE = 5.0  # seconds for the hub to say whether it has a model


def find(path: str | Path) -> str:
    """A folder that exists, or the name of a model that the hub has, or that was fetched from it before.

    Raises:
        InputError: there is neither. A path that can only be a folder's is told without asking the hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise InputError(f"{path}: a file, where a model folder is expected: give the folder that holds config.json")
    # "runs/model" reads like a hub name too: a first part that exists here says that a folder was meant.
    if not _HUB_NAME.fullmatch(str(path)) or (len(folder.parts) > 1 and Path(folder.parts[0]).exists()):
        raise InputError(
            f"{path}: no such folder{alike(folder, Path.is_dir)}: check the path, or run the stage that writes it"
        )
    name = str(path)
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        _ask_hub(name, f"{path}: no such folder{alike(folder, Path.is_dir)}, and")
    return name


def _ask_hub(name: str, problem: str) -> None:
    """Raises an InputError unless the hub has the model. It asks once; loading would retry for minutes."""
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{problem} no model of that name was fetched before (HF_HUB_OFFLINE is set): check the path")
    try:
        huggingface_hub.HfApi().model_info(name, timeout=_PATIENCE)
    except errors.GatedRepoError:
        raise InputError(f"{problem} the hub gives this model only to who is logged in and was let in by it") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(f"{problem} the hub has no model of that name: check the path") from None
    # No network, a proxy, a hub that is down: the libraries below have no common base.
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:150]
        raise InputError(f"{problem} the hub cannot be asked for a model of that name ({reason})") from None


def check_weight_files(folder: Path) -> None:
    """Raises an InputError if a folder lacks its weights, or a part of them."""
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if lost := [shard for shard in shards if not (folder / shard).is_file()]:
                raise InputError(f"{folder}: {some(lost)} is named in {index.name} and missing: copy the folder again")
            return
    raise InputError(f"{folder}: no weights in this folder: it needs {' or '.join(WEIGHT_FILES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; InputError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}): copy the folder again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: an object is expected here: copy the folder again")
    return found


def tensors_of(folder: Path, prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder whose names begin with one of the prefixes; the others are not read."""
    for name in sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name)):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  no mapping, and not iterable
                    if key.startswith(prefixes):
                        yield key, file.get_tensor(key)
        else:
            state = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            yield from ((key, tensor) for key, tensor in state.items() if key.startswith(prefixes))


def some(names: list[str]) -> str:
    """The first of several names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
