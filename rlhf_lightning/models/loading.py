"""Loads models and tokenizers from folders or hub names, and names every mistake in one line.

A path that exists is a local folder, and nothing is fetched. Any other name that reads like a hub name is left to
transformers. Dropout is off in every model: rollout, update and reference must compute log-probs by the same function,
else the first PPO ratio is not 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlhf_lightning.errors import InputError
from rlhf_lightning.models import adapter_folders
from rlhf_lightning.models.folders import check_weight_files, find, some
from rlhf_lightning.models.layers import embedding_weight
from rlhf_lightning.models.positions import rope_limit
from rlhf_lightning.models.reward_heads import find_head, normalise_as_saved, put_head, tells_outputs
from rlhf_lightning.models.template import turn_end_id

_CLASSIFIER = AutoModelForSequenceClassification.__name__
_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name.

    Without a pad token its pad becomes EOS. That is right here, because masks are made from lengths, and it leaves the
    embeddings as they are.

    Raises:
        InputError: there is no such folder, it has no tokenizer that loads, or the tokenizer has no EOS token.
    """
    folder = find(path)
    base = adapter_folders.base_of(folder)
    if base is not None and not (Path(folder) / "tokenizer_config.json").is_file():
        folder = base
    with _loading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM of a model folder or hub name, dropout off, in ``dtype``, on the CPU.

    The model's ``stored_dtype`` is the dtype of the weights in the folder, here and in `load_scalar_model`.

    Raises:
        InputError: no such folder, missing or unreadable weights, not a causal LM.
    """
    config = _load_config(path, trust_remote_code)
    model, missing = _load_model(AutoModelForCausalLM, path, config, dtype, trust_remote_code)
    if missing:
        made_for = ", ".join(config.architectures or ["another kind of model"])
        raise InputError(
            f"{path}: the weights of {made_for} lack {some(missing)}: give the folder of a causal language model"
        )
    return model


def load_scalar_model(
    path: str | Path,
    *,
    fresh_head: bool,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A trunk with one linear head ``score`` (``[1, H]``), as an ``AutoModelForSequenceClassification`` of one label.

    Args:
        path: with ``fresh_head=False`` a reward model's folder; with ``fresh_head=True`` a causal LM's folder, or a
            reward model's, of which only the trunk is taken.
        fresh_head: draw the head from N(0, 1 / (H + 1)) (Stiennon et al. 2020, appendix B.1), the same for the same
            ``seed``.
        seed: of that draw.

    Raises:
        InputError: as ``load_causal_lm``; also a family of models without such a class in transformers, and a head that
            is missing, or has several outputs, where a trained one was meant.
    """
    config = _load_config(path, trust_remote_code)
    brought = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and _CLASSIFIER not in brought:
        raise InputError(
            f"{path}: transformers has no sequence classifier of {config.model_type} models: give a reward model of "
            "another family; for a critic, set model.critic.kind to head"
        )
    folder = Path(find(path))
    head = find_head(folder) if folder.is_dir() and not fresh_head else None
    if fresh_head or (head is not None and (head[0] != "score" or not tells_outputs(folder))):
        config.num_labels = 1 if head is None else len(head[1]["weight"])
    labels = config.num_labels
    model, missing = _load_model(AutoModelForSequenceClassification, path, config, dtype, trust_remote_code)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise InputError(
            f"{path}: {type(model).__name__} keeps its head elsewhere than in 'score': use a decoder-only model"
        )
    if head is not None and labels == 1:
        normalise_as_saved(model.config, head[1])
        if head[0] != "score":
            put_head(model, *head, path)
            missing.remove("score.weight")
    if not fresh_head and "score.weight" in missing:
        raise InputError(
            f"{path}: no trained reward head in these weights (score.weight is missing): train one with "
            f"`python -m rlhf_lightning fit --config reward_model.yaml --model.model {path}` and give its folder"
        )
    if not fresh_head and labels != 1:
        raise InputError(f"{path}: the head has {labels} outputs, not 1: give a reward model's folder")
    if other := [name for name in missing if not name.startswith("score.")]:
        raise InputError(f"{path}: the weights lack {some(other)}: the folder is incomplete")
    if fresh_head:
        draw_head(score, seed)
    return model


def draw_head(head: nn.Linear, seed: int) -> None:
    """Fills ``head`` from N(0, 1 / (in_features + 1)), its bias with 0; the same on every machine for a seed."""
    generator = torch.Generator().manual_seed(seed)
    # Device and dtype are given explicitly, because Lightning builds models under defaults of its own.
    drawn = torch.randn(head.weight.shape, generator=generator, device="cpu", dtype=torch.float32)
    drawn /= math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether every token id of ``first`` is the same token to ``second``, so that ids can be handed over as they are.

    ``second`` may know more tokens (a reward model's saved pad, say). If False, decode and re-encode.
    """
    known = second.get_vocab()
    return all(known.get(token) == index for token, index in first.get_vocab().items())


def token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that have a token, ascending: what ``Policy`` takes for ``ids``."""
    return sorted(set(tokenizer.get_vocab().values()))


def check_vocabularies(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, where: str | Path = "model") -> None:
    """Refuses a tokenizer with ids for which the model has no embedding, or no row of its head.

    Raises:
        InputError: on a GPU that would be a device-side assert, long after the start.
    """
    rows = embedding_weight(model).shape[0]
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        rows = min(rows, head.weight.shape[0])
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= rows:
        raise InputError(
            f"{where}: the tokenizer has token {token!r} with id {index} and the model has embeddings for ids below "
            f"{rows}: use the tokenizer that belongs to the model, or resize its embeddings"
        )


def most_tokens(model: PreTrainedModel) -> int | None:
    """The positions that the model has; None where nothing says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_length(
    model: PreTrainedModel,
    tokens: int,
    where: str | Path = "model",
    options: str = "data.max_prompt_tokens, data.max_response_tokens or model.sampling.max_new_tokens",
) -> None:
    """Refuses sequences of ``tokens`` tokens where the model has positions for fewer.

    Args:
        model: the model.
        tokens: of the longest sequence.
        where: its folder, for messages.
        options: what to lower, for messages.

    Raises:
        InputError: learned positions would be an index error, rotary ones silently wrong.
    """
    if (limit := rope_limit(model.config)) is not None and tokens > limit:
        raise InputError(
            f"{where}: prompt and response may take {tokens} tokens, and past {limit} the angles of this model's "
            "rotary positions change for a whole batch at once, so a row's log-probs would depend on the rows beside "
            f"it: lower {options}"
        )
    limit = most_tokens(model)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{where}: prompt and response may take {tokens} tokens and the model has positions for {limit}: lower "
            f"{options}, and drop what is longer"
        )


def eos_ids(source: PreTrainedModel | GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response, sorted, each once.

    They are the tokenizer's EOS, the generation config's (an int or a list), and the token by which the tokenizer's
    chat template ends a turn.

    Raises:
        InputError: the generation config names something else than ids.
    """
    config = source.generation_config if isinstance(source, PreTrainedModel) else source
    declared = getattr(config, "eos_token_id", None)
    ids = list(declared) if isinstance(declared, list | tuple) else [declared]
    if any(not isinstance(id, int | None) for id in ids):
        raise InputError(f"generation_config.json: eos_token_id is {declared!r}: give an id, or a list of ids")
    return sorted({*ids, tokenizer.eos_token_id, turn_end_id(tokenizer)} - {None})


def _load_config(path: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    folder = find(path)
    folder = adapter_folders.base_of(folder) or folder
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise InputError(f"{path}: no config.json in this folder: give a model folder in Hugging Face's format")
    with _loading(path, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_kind(config, path)
    _disable_dropout(config)
    return config


def _load_model(
    auto: Any, path: str | Path, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its weights that the folder does not have."""
    folder = find(path)
    base = adapter_folders.base_of(folder)
    source = base or folder
    if Path(source).is_dir():
        check_weight_files(Path(source))
    # The fused experts' fast product is not made for float64, which Lightning's 64-true has models built in.
    exact = torch.float64 in (dtype, torch.get_default_dtype())
    options = {"experts_implementation": "eager"} if exact and _has_experts(config) else {}
    # On the CPU, also where Lightning has set another default device: from_pretrained there wants accelerate.
    with _loading(path, "model"), torch.device("cpu"):
        model, info = auto.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **options,
        )
        if base is not None:
            model = adapter_folders.merge(model, folder)
    model.stored_dtype = _stored_dtype(config, Path(source))
    missing = set(info["missing_keys"])
    for name, found, expected in info["mismatched_keys"]:
        if not name.startswith("score."):
            raise InputError(
                f"{path}: {name} is {list(found)} in the weights and {list(expected)} by config.json: the two do "
                "not belong together, copy the folder again"
            )
        missing.add(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # A padding_idx keeps its row from learning. Padding gets no gradient here anyway, and where pad is EOS the row
        # is a real token's.
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model, sorted(missing)


def _stored_dtype(config: PretrainedConfig, folder: Path) -> torch.dtype:
    """What stock transformers would load the weights in: by config.json, else by the first floats in the weights."""
    named: Any = config.dtype if config.dtype is not None else config.get_text_config().dtype
    if named is None:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                kinds = (weights.get_slice(name).get_dtype() for name in sorted(weights.keys()))
                named = next((_SAFETENSORS[kind] for kind in kinds if kind in _SAFETENSORS), None)
            break
    dtype = getattr(torch, named.removeprefix("torch.")) if isinstance(named, str) else named
    return dtype if dtype in _SAFETENSORS.values() else torch.float32


def _has_experts(config: PretrainedConfig) -> bool:
    return any("expert" in name for name in vars(config.get_text_config()))


def _check_kind(config: PretrainedConfig, path: str | Path) -> None:
    """Refuses what no causal LM can be made of, or none that can be trained."""
    if config.is_encoder_decoder:
        raise InputError(f"{path}: {config.model_type} is an encoder with a decoder: give a decoder-only model")
    if getattr(config, "quantization_config", None) is not None:
        given = config.quantization_config
        method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
        raise InputError(
            f"{path}: its weights are quantised ({method or 'quantization_config'}), and training needs them whole: "
            "give the model that it was made from"
        )
    if config.get_text_config() is not config:
        raise InputError(
            f"{path}: {config.model_type} is a model of text and of something else: give a folder of its language "
            "model alone"
        )


def _disable_dropout(config: PretrainedConfig) -> None:
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers' tables, warnings and progress bars off."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(path: str | Path, what: str) -> Iterator[None]:
    """Transformers quiet, and its errors in one line."""
    try:
        with quiet_transformers():
            yield
    # Whatever transformers, tokenizers or safetensors raise over a wrong folder: their errors have no common base.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path}: no {what} could be loaded from here: {reason}") from error
