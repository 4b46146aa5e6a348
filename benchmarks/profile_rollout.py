"""Where does the time of sampling responses go, and of the PPO step around it? Decides whether sampling needs a kernel.

    python benchmarks/profile_rollout.py [--model 16m|demo|135m] [--rows 16] [--new-tokens 48] [--repeats 3] [--step]

The rule: sampling gets a fused operator if it takes 5% or more of a PPO step, or of the rollouts that are all that
evaluating and annotating do. (The first half was set before the numbers; the second came after them, when a PPO step
without filters had shown 2%.) Random weights, no end of sequence, so every row decodes all
its tokens; medians after one to warm up, sampling by the fused operator and by its plain PyTorch reference in turn.
``--step`` times a whole PPO step too, with the module's own defaults.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.ops.sample_tokens import reference, sample_tokens
from rlhf_lightning.rewards import Reward
from rlhf_lightning.rollout import sampler

SHAPES = {
    "demo": {"vocab_size": 512, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
    "16m": {"vocab_size": 49152, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
FILTERS = {"no filter": {}, "top_k 50": {"top_k": 50}, "top_p 0.95": {"top_p": 0.95}}


class Clock:
    """Seconds spent in wrapped functions, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - began

        setattr(owner, name, timed)


class EvenReward(Reward):
    """A score that costs nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return (rollout.tokens % 2 == 0).float().sum(dim=1)


class Timed(PPOModule):
    """Keeps the seconds of each iteration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[dict[str, float]] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        began = time.perf_counter()
        super().training_step(batch, batch_idx)
        self.seconds.append({"step": time.perf_counter() - began, **self.phase_seconds})


def save_model(folder: Path, shape: dict[str, int]) -> int:
    """A random Llama and a tokenizer of one word an id; returns the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        intermediate_size=8 * shape["hidden_size"] // 3 // 16 * 16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **shape,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(shape["vocab_size"])}
    words["<pad>"], words["<eos>"] = words.pop("w0"), words.pop("w1")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2"
    ).save_pretrained(folder)
    return model.num_parameters()


def batch_of(rows: int, start: int, vocabulary: int) -> PromptBatch:
    """Prompts of 8 to 32 random tokens."""
    generator = torch.Generator().manual_seed(start)
    lengths = torch.randint(8, 33, (rows,), generator=generator)
    tokens = torch.randint(2, vocabulary, (rows, 32), generator=generator)
    tokens = torch.where(torch.arange(32) < lengths[:, None], tokens, 0)[:, : int(lengths.max())]
    return PromptBatch(tokens, lengths, start + torch.arange(rows), torch.ones(rows), ["prompt"] * rows, {})


def rollout_seconds(
    policy: Policy, batch: PromptBatch, tokenizer: Any, new_tokens: int, repeats: int, clock: Clock, **filters: Any
) -> dict[str, float]:
    """Median seconds of a rollout and of its parts."""
    rows = []
    for iteration in range(repeats + 1):
        clock.seconds.clear()
        began = time.perf_counter()
        sampler.sample(
            policy,
            batch,
            tokenizer,
            max_new_tokens=new_tokens,
            eos_ids=[],
            seed=0,
            iteration=iteration,
            **filters,
        )
        t = {"rollout": time.perf_counter() - began, **clock.seconds}
        t["trunk"] = t["decode"] - t["head"] - t["cache"]
        t["rest"] = t["rollout"] - t["decode"] - t["sampling"]
        rows.append(t)
    return {part: statistics.median(row[part] for row in rows[1:]) for part in rows[0]}


def step_seconds(folder: Path, batches: list[PromptBatch], new_tokens: int) -> dict[str, float]:
    """Median seconds of a PPO step and of its phases."""
    module = Timed(str(folder), EvenReward(), iterations=len(batches), max_new_tokens=new_tokens)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(batches, batch_size=None))
    return {part: statistics.median(row[part] for row in module.seconds[1:]) for part in module.seconds[0]}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=list(SHAPES), default="16m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.model]
    clock = Clock()
    clock.wrap(Policy, "decode", "decode")
    clock.wrap(Policy, "_logits", "head")
    clock.wrap(DynamicCache, "update", "cache")
    kinds = {"reference": reference, "fused": sample_tokens}
    batches = [batch_of(options.rows, i * options.rows, shape["vocab_size"]) for i in range(options.repeats + 1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = save_model(folder, shape)
        policy, tokenizer = Policy(load_causal_lm(folder)), AutoTokenizer.from_pretrained(folder)
        print(
            f"{options.model}: {parameters / 1e6:.1f}M parameters, {options.rows} rows, {options.new_tokens} new "
            f"tokens, {options.threads} threads, float32, {torch.backends.cpu.get_cpu_capability()}; milliseconds"
        )
        columns = ("rollout", "trunk", "head", "sampling", "cache", "rest")
        print(f"{'':22}", *(f"{column:>9}" for column in columns), "  sampling / rollout")
        for label, filters in FILTERS.items():
            for kind, function in kinds.items():
                sampler.sample_tokens = function
                clock.wrap(sampler, "sample_tokens", "sampling")
                t = rollout_seconds(
                    policy, batches[0], tokenizer, options.new_tokens, options.repeats, clock, **filters
                )
                numbers = (f"{1e3 * t[column]:9.1f}" for column in columns)
                print(f"{label:12}{kind:10}", *numbers, f"{t['sampling'] / t['rollout']:12.1%}")
        for kind, function in kinds.items() if options.step else ():
            sampler.sample_tokens = function
            clock.wrap(sampler, "sample_tokens", "sampling")
            t = step_seconds(folder, batches, options.new_tokens)
            print(f"PPO step    {kind:10}", ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in t.items()))


if __name__ == "__main__":
    main()
