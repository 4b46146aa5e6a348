"""Tiny models and tokenizers that every test may use; one thread, one seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TEXT = """
    user assistant : . , ? ! a the one two three four five six red green blue cat dog bird fish sees likes finds and
    not is was good bad big small old new it he she they what who where why how yes no please thanks hello bye very
    Human Assistant
"""
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and sums in one thread come out the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_tokenizer(pad_token: str) -> PreTrainedTokenizerFast:
    """One token a word, 64 at most; others are <unk>. Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then the words."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad_token, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(**changes: object) -> LlamaConfig:
    """The tiny Llama of the fixtures: 2 layers of width 32."""
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer("<pad>")


@pytest.fixture(scope="session")
def pad_is_eos_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer("<eos>")


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    torch.manual_seed(1)
    LlamaForCausalLM(make_config()).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "reward"
    torch.manual_seed(2)
    LlamaForSequenceClassification(make_config(num_labels=1)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
