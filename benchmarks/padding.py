"""How much of what SFT, DPO and the reward model compute is padding, by the data and the batch?

    python benchmarks/padding.py --tokenizer MODEL_FOLDER --data pairs.jsonl.gz [more ...]

Deals the rows out as training does (grouped by length, `data/batching.py`), and counts tokens: real ones, and those of
the rectangles that the modules' forward passes run on. Pairs are one rectangle, the chosen rows above the rejected.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from rlhf_lightning.data.batching import epoch_batches, make_bins
from rlhf_lightning.data.records import load_records
from rlhf_lightning.data.tokenization import Encoder, Example
from rlhf_lightning.models.loading import load_tokenizer

BATCHES = ((32, None), (8, None), (32, 8192), (128, 32768))  # rows at most, tokens at most


def lengths_of(example: Example) -> list[int]:
    """Tokens of each sequence that the row puts into a forward pass."""
    return [len(example.prompt) + len(response) for response in example.responses]


def padding(examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> float:
    """The share of a pass over all batches that is padding."""
    real = computed = 0
    for rows in batches:
        lengths = [length for row in rows for length in lengths_of(examples[row])]
        real += sum(lengths)
        computed += len(lengths) * max(lengths)
    return 1.0 - real / computed


def main() -> None:
    """Print a line a data file, view and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model's folder")
    parser.add_argument("--data", nargs="+", required=True, help="files of pairs")
    options = parser.parse_args()
    encoder = Encoder(load_tokenizer(options.tokenizer), max_prompt_tokens=2048, max_response_tokens=2048)
    for path in options.data:
        records = load_records(path)
        for kind in ("demonstrations", "pairs"):
            examples = encoder.encode(records.rows, kind)[0]
            lengths = [length for example in examples for length in lengths_of(example)]
            quartiles = ", ".join(f"{q:.0f}" for q in statistics.quantiles(lengths, n=4))
            print(f"{path}, {kind}: {len(examples)} rows, quartiles of the tokens in a sequence {quartiles}")
            for size, tokens in BATCHES:
                grouped = epoch_batches(make_bins(examples, size, tokens), seed=0, epoch=0)
                shuffled = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
                print(
                    f"  batch_size {size:>3}, batch_tokens {tokens}: {padding(examples, grouped):.1%} padding; "
                    f"as the rows come: {padding(examples, shuffled):.1%}"
                )


if __name__ == "__main__":
    main()
