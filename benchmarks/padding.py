"""How much of what SFT, DPO and the reward model compute is padding, or computed already, by the data and the batch?

    python benchmarks/padding.py --tokenizer MODEL_FOLDER --data pairs.jsonl.gz [more ...]

Deals the rows out as training does (grouped by length, `data/batching.py`), and counts tokens: real ones, and those of
the rectangles around them; and of the real ones those of beginnings that rows of a batch have in common. Pairs are one
rectangle, the chosen rows above the rejected. A policy leaves both out of all layers but attention
(`models/packing.py`); what that gains on this machine:

    python benchmarks/padding.py --tokenizer MODEL_FOLDER --data pairs.jsonl.gz --size 16m --batches 4
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import clock
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from training.sizes import PROFILED, save_random

from rlhf_lightning.data.batching import epoch_batches, make_bins
from rlhf_lightning.data.records import load_records
from rlhf_lightning.data.tokenization import Encoder, Example
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.packed_rows import beginnings
from rlhf_lightning.models.policy import Policy

WORDS = 512  # of the vocabulary, which every size has; ids are taken to be one of these
BATCHES = ((32, None), (8, None), (32, 8192), (128, 32768))  # rows at most, tokens at most


def padding(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> float:
    """The share of a pass over all batches that is padding."""
    real = computed = 0
    for rows in batches:
        lengths = [length for row in rows for length in examples[row].widths]
        real += sum(lengths)
        computed += len(lengths) * max(lengths)
    return 1.0 - real / computed


def tensors(examples: Sequence[Example], rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' tokens, and the lengths of sequences and of prompts."""
    of = [(examples[row].prompt, response) for row in rows for response in examples[row].responses]
    tokens = pad_sequence([torch.cat(parts).long() % WORDS for parts in of], batch_first=True)
    return tokens, torch.tensor([sum(map(len, parts)) for parts in of]), torch.tensor([len(prompt) for prompt, _ in of])


def alike(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> float:
    """The share of all real tokens that a row of the same batch has begun with before."""
    real = kept = 0
    for rows in batches:
        tokens, lengths, _ = tensors(examples, rows)
        real += int(lengths.sum())
        kept += beginnings(tokens, lengths).size
    return 1.0 - kept / real


def seconds(policy: Policy, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[bool, float]:
    """Of a forward and backward pass over all batches, packed (True) and padded; the ways take turns."""
    spent = {True: 0.0, False: 0.0}
    for number, batch in enumerate((batches[0], *batches)):
        for packs in spent if number % 2 == 0 else reversed(spent):
            policy.packs = packs
            policy.zero_grad()
            taken = clock.seconds(lambda: policy(*batch).log_probs.sum().backward(), "cpu")  # noqa: B023
            spent[packs] += taken * (number > 0)  # the first one warms up
    return spent


def measure(examples: Sequence[Example], size: str, count: int) -> None:
    """Print what each way takes for a few batches, drawn at random as training draws them."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(PROFILED[size][0], Path(folder))
        policy = Policy(load_causal_lm(folder))
    for rows, tokens in BATCHES[:3]:
        drawn = epoch_batches(make_bins(examples, rows, tokens), seed=0, epoch=0)[:count]
        spent = seconds(policy, [tensors(examples, batch) for batch in drawn])
        taken = f"{spent[False]:.2f} s padded, {spent[True]:.2f} s packed, {spent[False] / spent[True]:.2f}x"
        shares = f"{padding(examples, drawn):.1%} padding, {alike(examples, drawn):.1%} alike"
        print(f"  batch_size {rows:>3}, batch_tokens {tokens}, {size}, {len(drawn)} batches, {shares}: {taken}")


def main() -> None:
    """Print a line a data file, view and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model's folder")
    parser.add_argument("--data", nargs="+", required=True, help="files of pairs")
    parser.add_argument("--size", choices=PROFILED, help="time passes of a model of this size")
    parser.add_argument("--batches", type=int, default=4, help="to time")
    options = parser.parse_args()
    encoder = Encoder(load_tokenizer(options.tokenizer), max_prompt_tokens=2048, max_response_tokens=2048)
    for path in options.data:
        records = load_records(path)
        for kind in ("demonstrations", "pairs"):
            examples = encoder.encode(records.rows, kind)[0]
            lengths = [length for example in examples for length in example.widths]
            quartiles = ", ".join(f"{q:.0f}" for q in statistics.quantiles(lengths, n=4))
            print(f"{path}, {kind}: {len(examples)} rows, quartiles of the tokens in a sequence {quartiles}")
            if options.size:
                measure(examples, options.size, options.batches)
                continue
            for size, tokens in BATCHES:
                grouped = epoch_batches(make_bins(examples, size, tokens), seed=0, epoch=0)
                shuffled = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
                print(
                    f"  batch_size {size:>3}, batch_tokens {tokens}: {padding(examples, grouped):.1%} padding, "
                    f"{alike(examples, grouped):.1%} alike; as the rows come: {padding(examples, shuffled):.1%} padding"
                )


if __name__ == "__main__":
    main()
