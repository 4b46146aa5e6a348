"""Tokens per second of a rollout by each engine, and its share of what the memory's bandwidth allows.

    python benchmarks/bench_rollout.py [--size tiny|16m|smollm2|1.5b] [--device cpu|cuda] [--weights float32|bfloat16]
        [--engines native ...] [--json FILE]

The models and prompts are those of ``bench_training.py`` (random weights but for smollm2); no token ends a response, so
that every row decodes all its tokens. ``generate`` is the peer: transformers' own on one left-padded batch, with its
own sampling, for tokens alone, where our engines give log-probs, entropy and text too. The engines take turns; a number
is the median of the repeats, after one rollout to warm up. The limit: in each step the weights and the cache entries
that are real are read once, at the bandwidth of a copy measured in the same run; prompts are free in it. Prints a
table, and after every rollout writes FILE and a page beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import clock, report
from training import sizes
from training.entrants import decoding_bytes
from training.ours import examples
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.collate import collate
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import NativeEngine, RolloutEngine, Sampling, TransformersEngine


class Batched:
    """Transformers' ``generate`` as most call it, on a model of its own; it stands where an engine does."""

    model: Any = None

    def rollout(self, policy: Policy, prompts: PromptBatch, tokenizer: Any, sampling: Sampling) -> torch.Tensor:
        """``[B, P + T]``, the prompts padded on the left."""
        tokens, device = prompts.tokens, prompts.tokens.device
        if self.model is None:
            folder, dtype = policy.model.name_or_path, next(policy.parameters()).dtype
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            self.model.generation_config = GenerationConfig()  # its own would fill in an EOS
        width = tokens.shape[1]
        places = torch.arange(width, device=device) - (width - prompts.lengths)[:, None]
        found: torch.Tensor = self.model.generate(
            tokens.gather(1, places.clamp(min=0)),
            attention_mask=(places >= 0).long(),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens, do_sample=True, top_k=0, pad_token_id=0
            ),
        )
        assert found.shape[1] == width + sampling.max_new_tokens
        return found


ENGINES: dict[str, Callable[[], RolloutEngine | Batched]] = {
    "plain steps": lambda: NativeEngine(cuda_graphs=False),
    "native": NativeEngine,
    "compiled": lambda: NativeEngine(compile_steps=True),
    "transformers": TransformersEngine,
    "generate": Batched,
}


def bytes_of_decoding(policy: Policy, prompts: PromptBatch, new_tokens: int) -> float:
    """What the steps after the prefill read: all weights in each, and each row's entries."""
    config, parameter = policy.model.config, next(policy.parameters())
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * width * parameter.element_size()
    weights = sum(p.nbytes for p in policy.parameters())
    return decoding_bytes(weights, entry, prompts.lengths.tolist(), new_tokens)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of every repeat by engine, and the limit: all there is, after every timed rollout."""
    device = options.device
    folder, size = sizes.prepare(options.size, device), sizes.size_of(options.size, device)
    policy = Policy(load_causal_lm(folder / "policy", dtype=getattr(torch, options.weights))).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    kind, rows = examples("ppo", sizes.work(folder))
    prompts = collate(rows, kind, tokenizer.pad_token_id).to(device)
    engines = {name: ENGINES[name]() for name in options.engines}
    bandwidth = clock.copy_bandwidth(device)
    found: dict[str, Any] = {
        "rows": len(prompts),
        "new_tokens": size.new_tokens,
        "weights": options.weights,
        "copy_gb_a_second": bandwidth / 1e9,
        "limit_seconds": bytes_of_decoding(policy, prompts, size.new_tokens) / bandwidth,
        "seconds": {},
        "first_seconds": {},
    }
    for repeat in range(options.repeats + 1):
        for name, engine in engines.items():
            sampling = Sampling(max_new_tokens=size.new_tokens, eos_ids=[], iteration=repeat)
            taken = clock.seconds(lambda: engine.rollout(policy, prompts, tokenizer, sampling), device)  # noqa: B023
            if repeat == 0:
                found["first_seconds"][name] = taken
            else:
                found["seconds"].setdefault(name, []).append(taken)
                yield found


def table(found: dict[str, Any]) -> list[str]:
    """Markdown, a line an engine."""
    rows = [["engine", "seconds", "tokens a second", "share of the limit", "first rollout, seconds"]]
    for name, times in found["seconds"].items():
        middle = statistics.median(times)
        rate, share = found["rows"] * found["new_tokens"] / middle, found["limit_seconds"] / middle
        rows.append([name, f"{middle:.3f}", f"{rate:,.0f}", f"{share:.0%}", f"{found['first_seconds'][name]:.2f}"])
    return report.markdown(rows)


def main() -> None:
    """Measures, prints, writes."""
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=sizes.SIZES, default="16m")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], help="default: by device")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["native", "generate"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats: one at least")
    options.weights = options.weights or ("float32" if options.device == "cpu" else "bfloat16")
    torch.set_num_threads(options.threads)
    about = report.about(options.device, options.threads)
    for found in measure(options):
        what = f"{options.size}, {found['rows']} rows of {found['new_tokens']} new tokens, weights in "
        what += f"{found['weights']}. A copy moves {found['copy_gb_a_second']:.1f} GB a second: "
        what += f"{found['limit_seconds']:.3f} s at least."
        if options.json:
            results = {"about": about, "size": options.size, **found}
            report.write(results, options.json, f"Rollouts: {options.size}", what, table(found))
    print("\n".join([what, "", *table(found)]))


if __name__ == "__main__":
    main()
