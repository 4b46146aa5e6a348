"""Tiny models and tokenizers, as functions: what the fixtures of conftest.py are made of."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TEXT = """
    user assistant : . , ? ! a the one two three four five six red green blue cat dog bird fish sees likes finds and
    not is was good bad big small old new it he she they what who where why how yes no please thanks hello bye very
    Human Assistant of to in on at with for
"""
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def make_tokenizer(pad_token: str) -> PreTrainedTokenizerFast:
    """One token a word, 64 in all; others are <unk>. Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then the words."""
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
