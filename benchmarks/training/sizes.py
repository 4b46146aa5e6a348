"""The models, and the work that every side does on them: the same weights and the same rows of token ids.

`prepare` writes them to a folder: ``policy`` and ``reward`` (a causal LM and a model of one scalar with a random head,
each with its tokenizer) and ``work.json``, the rows. The critic of PPO starts as a copy of the reward model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness.report import ROOT

SMOLLM2 = ROOT / "models" / "smollm2"
FIRST_WORD = 4  # ids below it are special
PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "bf16-mixed": "float32"}  # dtype of the weights
TASKS = ("ppo", "sft", "reward_model", "dpo")


@dataclass(frozen=True)
class Size:
    """A model and the rows of a step; lengths are (shortest, longest)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str = "float32"  # of the folder's weights
    folder: Path | None = None  # of weights that are not random
    prompts: int = 16
    prompt: tuple[int, int] = (8, 32)
    new_tokens: int = 48
    minibatches: int = 4
    micro_rows: int | None = None  # of a minibatch in one pass of a peer; None for all (ours has its own bound)
    rows: int = 16  # of SFT, and pairs of the other two
    response: tuple[int, int] = (8, 96)  # of those
    learning_rate: dict[str, float] = field(
        default_factory=lambda: {"ppo": 1e-4, "sft": 1e-4, "reward_model": 1e-4, "dpo": 1e-5}
    )


_SLOW = {"ppo": 3e-6, "sft": 2e-5, "reward_model": 1e-5, "dpo": 1e-6}
SIZES = {
    "tiny": Size(32, 64, 2, 2, 2, 101, prompts=8, prompt=(2, 6), new_tokens=5, rows=4, response=(2, 9)),
    "16m": Size(256, 688, 4, 4, 4, 49152),
    "smollm2": Size(576, 1536, 30, 9, 3, 49152, folder=SMOLLM2, learning_rate=_SLOW),
    # Random weights, in a shape between Qwen2.5-1.5B's and SmolLM2-1.7B's.
    "1.5b": Size(2048, 7168, 26, 16, 4, 49152, dtype="bfloat16", learning_rate=_SLOW),
}


# What `profile_steps.py` trains: a size, Lightning's precision, and further options of PPO.
PROFILED: dict[str, tuple[Size, str, dict[str, Any]]] = {
    "16m": (replace(SIZES["16m"], response=(16, 48)), "32-true", {"epochs": 1}),
    # The model, batches and lengths of the demo (configs/demo/).
    "demo": (
        Size(192, 512, 2, 4, 4, 768, prompts=128, prompt=(17, 21), minibatches=2, rows=32, response=(20, 48)),
        "32-true",
        {"epochs": 2},
    ),
    # SmolLM2-135M's shape, as configs/smollm2/ train it.
    "smollm2": (
        replace(SIZES["smollm2"], prompts=8, prompt=(40, 80), minibatches=2, response=(16, 48)),
        "bf16-mixed",
        {"epochs": 1, "critic": "head", "micro_batch_tokens": 2048},
    ),
}


def size_of(name: str, device: str) -> Size:
    """On a GPU a step has the rows of one: 128 prompts, 512 new tokens."""
    size = SIZES[name]
    if device == "cpu" or name == "tiny":
        return size
    larger: dict[str, Any] = {"prompts": 128, "prompt": (32, 128), "new_tokens": 512, "rows": 64, "response": (64, 512)}
    if name == "1.5b":  # more would not fit on a GPU of 141 GB, on either side
        larger |= {"rows": 16, "micro_rows": 8}
    return replace(size, **larger)


def prepare(name: str, device: str) -> Path:
    """The folder with the models and the rows, made where it is not there yet."""
    size = size_of(name, device)
    folder = ROOT / "build" / "training" / f"{name}-{device}"
    stamp = json.dumps(asdict(size), default=str)
    if (folder / "stamp").exists() and (folder / "stamp").read_text() == stamp:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fill(size, folder)
    (folder / "stamp").write_text(stamp)
    return folder


def fill(size: Size, folder: Path) -> None:
    """Write the models and the rows."""
    if size.folder is None:
        save_random(size, folder / "policy", size.dtype)
    elif size.folder.is_dir():
        (folder / "policy").symlink_to(size.folder.resolve())
    else:
        raise SystemExit(f"{size.folder.relative_to(ROOT)} is not there: make it with `make smollm2`")
    _save_reward(size, folder)
    (folder / "work.json").write_text(json.dumps(draw_work(size)))


def work(folder: Path) -> dict[str, Any]:
    """``prompts``, ``demonstrations`` (prompt, response) and ``pairs`` (prompt, chosen, rejected), as lists of ids."""
    rows: dict[str, Any] = json.loads((folder / "work.json").read_text())
    return rows


def save_random(size: Any, folder: Path, dtype: str = "float32") -> None:
    """A Llama of random weights, embeddings tied, and a tokenizer of as many words; ``size`` has a `Size`'s shapes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    words |= {f"w{index}": index for index in range(FIRST_WORD, size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)


def _save_reward(size: Size, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    dtype = getattr(torch, size.dtype)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, dtype=dtype)
    with torch.no_grad():
        model.score.weight.normal_(0.0, (size.hidden + 1) ** -0.5)
    model.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "policy").save_pretrained(folder / "reward")


def draw_work(size: Size, seed: int = 2) -> dict[str, Any]:
    """New rows, as `work` has them."""
    draw = torch.Generator().manual_seed(seed)

    def lengths(bounds: tuple[int, int], count: int) -> list[int]:
        return torch.randint(bounds[0], bounds[1] + 1, (count,), generator=draw).tolist()

    def row(length: int) -> list[int]:
        ids: list[int] = torch.randint(FIRST_WORD, size.vocabulary, (length,), generator=draw).tolist()
        return ids

    before = lengths(size.prompt, size.rows)
    sides = [lengths(size.response, size.rows) for _ in range(2)]
    return {
        "prompts": [row(length) for length in lengths(size.prompt, size.prompts)],
        "demonstrations": [[row(p), row(r)] for p, r in zip(before, sides[0], strict=True)],
        "pairs": [[row(p), row(c), row(r)] for p, c, r in zip(before, *sides, strict=True)],
    }
