"""Trained models out, as folders that stock transformers loads.

A folder appears whole or not at all: it is written beside its place, flushed to disk and renamed, and a folder that is
there already is replaced only after that. Under FSDP2 every process calls; process 0 writes.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import eos_ids, quiet_transformers
from rlhf_lightning.models.lora import merged
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import full_state_dict

_NEW_PAD = "<|pad|>"


def export_policy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the causal LM (no critic) and the tokenizer: ``AutoModelForCausalLM.from_pretrained(folder)``.

    An adapter is added to the weights, here and in `export_scalar`: the folder needs no peft.

    The generation config tells ``generate`` every token that ends a response here.

    Raises:
        InputError: ``folder`` holds something else than a model.
    """
    saved = _with_own_configs(policy.model)
    ends = eos_ids(policy.model, tokenizer)
    saved.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if saved.generation_config.pad_token_id is None:
        saved.generation_config.pad_token_id = tokenizer.pad_token_id
    _export(saved, _model_state(policy), tokenizer, folder)


def export_scalar(scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a reward model: ``AutoModelForSequenceClassification.from_pretrained(folder)`` gives the raw scores.

    Stock classifiers score at the last token that differs from ``config.pad_token_id``. So that this is the last real
    token, the saved pad (of config and tokenizer) never ends a response: the tokenizer's own pad if it is not an EOS;
    else BOS, or another special token that is neither EOS nor unknown; else a new token, with an embedding row of zeros
    where the model has no spare one. The scores' mean and deviation are in config.json and applied by our loader alone.

    Raises:
        InputError: ``folder`` holds something else than a model.
    """
    state = _model_state(scalar)
    saved = _with_own_configs(scalar.model)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    rows = scalar.model.config.get_text_config().vocab_size
    pad = _distinct_pad(tokenizer, saved.config, rows)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
        if tokenizer.pad_token_id >= rows:
            _grow(saved, state, tokenizer.pad_token_id + 1)
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    saved.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    saved.config.pad_token_id = tokenizer.pad_token_id
    _export(saved, state, tokenizer, folder)


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write to, that takes ``folder``'s place when the block ends without an error.

    Raises:
        InputError: ``folder`` is a file, or has files but no config.json: it is somebody's, and not a model.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: something that is not a model stands here: move it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        for path in [*staged.rglob("*"), staged]:
            flush(path)
        stood = folder.exists()
        if stood:
            folder.rename(replaced)
        try:
            staged.rename(folder)
        except BaseException:
            if stood:
                replaced.rename(folder)
            raise
        flush(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _export(
    model: PreTrainedModel, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    distributed = torch.distributed.is_initialized()
    try:
        if not distributed or torch.distributed.get_rank() == 0:
            with replacing(folder) as staged, quiet_transformers():
                model.save_pretrained(staged, state_dict=state)
                tokenizer.save_pretrained(staged)
    finally:
        if distributed:  # nobody goes on to read a folder that is not there yet
            torch.distributed.barrier()


def _model_state(module: Policy | ScalarModel) -> dict[str, Tensor]:
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in full_state_dict(module).items() if k.startswith(prefix)}
    return dict(merged(state.items(), module.model))


def _with_own_configs(model: PreTrainedModel) -> PreTrainedModel:
    """The same model to ``save_pretrained``, with configs that can be changed without changing the model's."""
    saved = copy.copy(model)
    saved.config = copy.deepcopy(model.config)
    if model.can_generate():
        saved.generation_config = copy.deepcopy(model.generation_config)
    return saved


def _distinct_pad(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rows: int) -> int | None:
    declared = config.eos_token_id
    ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
    candidates: list[Any] = [tokenizer.pad_token_id, tokenizer.bos_token_id]
    # An unknown word can be the last of a response that was cut; BOS and role markers can not.
    candidates += [token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id]
    usable = (token for token in candidates if token is not None and token not in ends and token < rows)
    return next(usable, None)


def _grow(model: PreTrainedModel, state: dict[str, Tensor], rows: int) -> None:
    """Embedding rows of zeros up to ``rows``, in ``state`` and the config."""
    embeddings = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)
    if name in state:  # only process 0 holds the weights
        state[name] = torch.cat([state[name], state[name].new_zeros(rows - len(state[name]), state[name].shape[1])])
    model.config.get_text_config().vocab_size = rows


def flush(path: Path) -> None:
    """fsync a file, or a folder so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
