"""Export: writes trained models as folders that stock transformers loads.

A folder appears whole or not at all: it is written beside its place, flushed to disk and renamed, and a folder that is
there already is replaced only after that; files in it that are no part of a model are kept. Under FSDP2 every process
calls; process 0 writes.
"""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_lightning.collectives import barrier, rank
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.models.loading import eos_ids, quiet_transformers
from rlhf_lightning.models.lora import merged
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.replacing import beside, check_free, clear_beside, place_of, replacing
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import full_state_dict
from rlhf_lightning.outputs import check_room

ExportDtype = Literal["auto", "float32", "bfloat16", "float16"]

_NEW_PAD = "<|pad|>"


@dataclass
class _Parts:
    """What a folder holds beside the weights; free to be changed, the model's own stay as they are."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype  # of the weights in the folder
    rows: int | None = None  # of the embeddings, where there must be more than the model has
    left_out: dict[str, Any] = field(default_factory=dict)  # of the generation config: what would not save


def export_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: ExportDtype = "auto",
    card: str | None = None,
) -> None:
    """Writes the causal LM (no critic) and the tokenizer: ``AutoModelForCausalLM.from_pretrained(folder)``.

    An adapter is added to the weights, here and in `export_scalar`: the folder needs no peft.

    The generation config tells ``generate`` every token that ends a response here.

    Args:
        policy: the policy.
        tokenizer: as it was used: its chat template is saved with it.
        folder: where to; a model that stands there is replaced.
        dtype: of the weights; ``auto`` is that of the folder that the model was loaded from.
        card: the folder's README.md; None writes none.

    Raises:
        InputError: ``folder`` holds something else than a model.
    """
    _export(policy, _policy_parts(policy, tokenizer, dtype), folder, card)


def export_scalar(
    scalar: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: ExportDtype = "auto",
    card: str | None = None,
) -> None:
    """Writes a reward model: ``AutoModelForSequenceClassification.from_pretrained(folder)`` gives the raw scores.

    Stock classifiers score at the last token that differs from ``config.pad_token_id``. So that this is the last real
    token, the saved pad (of config and tokenizer) never ends a response: the tokenizer's own pad if it is not an EOS;
    else BOS, or another special token that is neither EOS nor unknown; else a new token, with an embedding row of zeros
    where the model has no spare one. The scores' mean and deviation are in config.json and applied by our loader alone.

    Arguments and errors are those of `export_policy`.
    """
    _export(scalar, _scalar_parts(scalar, tokenizer, dtype), folder, card)


def try_export(
    model: Policy | ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: ExportDtype = "auto",
    trust_remote_code: bool = False,
) -> list[str]:
    """Writes everything but the weights beside ``folder``, reads it back and removes it, so that a failure shows now.

    One process calls it.

    Returns: a sentence for each thing that an export changes and its user may not expect.

    Raises:
        InputError: ``folder`` cannot be written or has no room, holds something else than a model, or a config, a chat
            template or the tokenizer does not survive being saved and loaded.
    """
    if isinstance(model, Policy):
        parts = _policy_parts(model, tokenizer, dtype)
    else:
        parts = _scalar_parts(model, tokenizer, dtype)
    folder = place_of(folder)
    check_free(folder)
    made = [parent for parent in folder.parents if not parent.exists()]
    clear_beside(folder)
    staged = beside(folder, "try")
    try:
        try:
            staged.mkdir(parents=True)
            (staged / "config.json").write_text("{}")
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written ({error.strerror}); choose another place for the run"
            ) from None
        needed = sum(parameter.numel() for parameter in model.parameters()) * parts.dtype.itemsize
        check_room(folder, needed, "the trained model takes", "another place for the run")
        try:
            with quiet_transformers():
                _write(parts, {}, staged)
                _read_back(parts, staged, trust_remote_code)
        except InputError:
            raise
        except Exception as error:  # transformers and tokenizers raise anything over what they cannot save
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"{folder}: the trained model could not be saved ({reason}); repair the folder that it starts from"
            ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
    if not parts.left_out:
        return []
    named = ", ".join(f"{name} {value}" for name, value in parts.left_out.items())
    return [f"the generation config's {named} would not save, as nothing there uses it: the exported one is without"]


def _policy_parts(policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: ExportDtype) -> _Parts:
    saved = _with_own_configs(policy.model)
    config = saved.generation_config
    assert config is not None
    ends = eos_ids(policy.model, tokenizer)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    return _Parts(saved, tokenizer, _dtype(policy.model, dtype), left_out=_make_savable(config))


def _scalar_parts(scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, dtype: ExportDtype) -> _Parts:
    saved = _with_own_configs(scalar.model)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    parts = _Parts(saved, tokenizer, _dtype(scalar.model, dtype))
    rows = scalar.model.config.get_text_config().vocab_size
    pad = _distinct_pad(tokenizer, saved.config, rows)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
        if tokenizer.pad_token_id >= rows:
            parts.rows = saved.config.get_text_config().vocab_size = tokenizer.pad_token_id + 1
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    saved.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    saved.config.pad_token_id = tokenizer.pad_token_id
    return parts


def _make_savable(config: GenerationConfig) -> dict[str, Any]:
    """Resets what strict validation refuses and plain generation ignores (a temperature without sampling); returns it.

    What it refuses for another reason stays, for `try_export` to report.
    """
    left_out: dict[str, Any] = {}
    plain = GenerationConfig()
    while True:
        try:
            config.validate(strict=True)
            return left_out
        except ValueError as error:
            names = [n for n in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE) if n not in left_out]
        if not names:
            return left_out
        for name in names:
            left_out[name] = getattr(config, name)
            setattr(config, name, getattr(plain, name, None))


def _dtype(model: PreTrainedModel, wanted: ExportDtype) -> torch.dtype:
    check_choice("export_dtype", wanted, ExportDtype)
    return getattr(model, "stored_dtype", model.dtype) if wanted == "auto" else getattr(torch, wanted)


def _export(module: Policy | ScalarModel, parts: _Parts, folder: str | Path, card: str | None) -> None:
    state = _model_state(module)
    try:
        if rank() == 0:
            if parts.rows is not None:
                _grow(parts.model, state, parts.rows)
            with replacing(folder) as staged, quiet_transformers():
                _write(parts, state, staged)
                if card is not None:
                    (staged / "README.md").write_text(card, encoding="utf-8")
    finally:
        barrier()  # no process may read a folder that is not there yet


def _write(parts: _Parts, state: dict[str, Tensor], folder: Path) -> None:
    state, parts.dtype = _cast(state, parts.dtype, parts.model)
    parts.model.save_pretrained(folder, state_dict=state)
    parts.model.config.dtype = parts.dtype  # `save_pretrained` took that of the weights in memory
    parts.model.config.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    _copy_code(parts.model.config, folder)


def _cast(
    state: dict[str, Tensor], dtype: torch.dtype, model: PreTrainedModel
) -> tuple[dict[str, Tensor], torch.dtype]:
    """The weights in ``dtype``, but for those that transformers keeps in float32; tied ones stay one tensor."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    done: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) in done:
            continue
        cast = tensor.is_floating_point() and not kept.intersection(name.split("."))
        done[id(tensor)] = tensor.to(dtype) if cast else tensor
        if cast and dtype == torch.float16 and done[id(tensor)].isinf().any() and not tensor.isinf().any():
            warnings.warn(f"{name} holds numbers beyond float16: the model is saved in float32", stacklevel=2)
            return state, torch.float32
    return {name: done[id(tensor)] for name, tensor in state.items()}, dtype


def _copy_code(config: PretrainedConfig, folder: Path) -> None:
    """The Python files beside the weights that the model was loaded from, where its config asks for them."""
    source = Path(getattr(config, "_name_or_path", "") or ".")
    if getattr(config, "auto_map", None) and (source / "config.json").is_file():
        for path in source.glob("*.py"):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _read_back(parts: _Parts, folder: Path, trust_remote_code: bool) -> None:
    AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if parts.model.can_generate():
        GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.get_vocab() != parts.tokenizer.get_vocab():
        raise ValueError("the tokenizer, saved and loaded again, has another vocabulary")
    if tokenizer.chat_template != parts.tokenizer.chat_template:
        raise ValueError("the chat template, saved and loaded again, is another")


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
    """Embedding rows of zeros up to ``rows``, in ``state``."""
    embeddings = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)
    if name in state:  # only process 0 holds the weights
        state[name] = torch.cat([state[name], state[name].new_zeros(rows - len(state[name]), state[name].shape[1])])
