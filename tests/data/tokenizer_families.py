"""A small tokenizer of each family, and how its ids of prompt and response compare with those of the whole text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder

VOCABULARY = 4000
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# The user's text between marks that are no tokens, and nothing between the last of them and the answer but a space.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(texts: Iterable[str], regex: str | None, prefix: bool = False) -> Tokenizer:
    """Byte-level BPE, cut by GPT-2's rule or another."""
    tokenizer = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        own = pre_tokenizers.Sequence([split, own])
    tokenizer.pre_tokenizer = own
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def metaspace(texts: Iterable[str], scheme: str) -> Tokenizer:
    """BPE of words with a mark before each, by the pre-tokenizer (Mistral's and newer Llama-2's way)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    return tokenizer


def prepended(texts: Iterable[str]) -> Tokenizer:
    """BPE over the whole text with byte fallback and a mark put before it by the normaliser (Llama-2's and Phi-3's)."""
    trained = metaspace(texts, "always")
    tokenizer = Tokenizer(trained.model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram(texts: Iterable[str]) -> Tokenizer:
    """T5's: a unigram model over marked words, white space made equal."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


def word_piece(texts: Iterable[str]) -> Tokenizer:
    """BERT's, cased."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FAMILIES: dict[str, Callable[[Sequence[str]], Tokenizer]] = {
    "byte-level BPE (GPT-2)": lambda texts: byte_level(texts, None),
    "byte-level BPE with a prefix space": lambda texts: byte_level(texts, None, prefix=True),
    "byte-level BPE (Llama-3's rule)": lambda texts: byte_level(texts, LLAMA3),
    "Metaspace first (Mistral)": lambda texts: metaspace(texts, "first"),
    "Metaspace always": lambda texts: metaspace(texts, "always"),
    "Prepend, byte fallback (Llama-2)": prepended,
    "Unigram (T5)": unigram,
    "WordPiece (BERT)": word_piece,
}


def family(name: str, texts: Sequence[str], template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of the family, trained on the texts."""
    return PreTrainedTokenizerFast(
        tokenizer_object=FAMILIES[name](texts),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        additional_special_tokens=SPECIAL[3:], chat_template=template,
    )  # fmt: skip


def count(tokenizer: Any, records: Sequence[Record], chat: bool) -> Counter[str]:
    """Rows by how their ids, or those of chats, compare with the whole text's: see `compared`."""
    encoder = Encoder(tokenizer, chat=chat)
    found: Counter[str] = Counter()
    for example in encoder.encode(records, "demonstrations")[0]:
        record = example.record
        prompt, response = example.prompt.tolist(), example.responses[0].tolist()
        if chat:
            turns = [message.turn() for message in (*record.messages, *record.answer(0))]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            whole = tokenizer(text, add_special_tokens=False).input_ids
            whole = whole[: len(whole) - whole[::-1].index(response[-1])]
        else:
            prompt, response = prompt[len(encoder.ids.bos) :], response[:-1]
            text = str(record.prompt) + str(record.responses[0])
            whole = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        found[compared(prompt, response, whole)] += 1
    return found


def compared(prompt: list[int], response: list[int], whole: list[int]) -> str:
    """``equal``; ``merged`` where all that differs lies around the border; else ``other``."""
    ids = prompt + response
    if ids == whole:
        return "equal"
    shorter = min(len(ids), len(whole))
    same = next((i for i in range(shorter) if ids[i] != whole[i]), shorter)
    behind = next((i for i in range(shorter) if ids[-1 - i] != whole[-1 - i]), shorter)
    return "merged" if same <= len(prompt) <= len(ids) - behind else "other"
