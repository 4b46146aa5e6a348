"""Split one preference file into three without a common prompt: for the policy, for the judge, and held out.

A win rate by the reward model that PPO optimised says how well it was optimised, not whether answers got better. So the
first part of the prompts trains the policy's reward model (and SFT, DPO and PPO). The second part trains another reward
model that only judges. The third part is for measuring. The split is by a hash of the prompt: all rows of a prompt are
in the same part, and new rows in the file move none of the others.

    python examples/smollm2/split.py pairs.jsonl.gz --out runs/smollm2/data

It writes policy.jsonl, judge.jsonl and heldout.jsonl (rows as they were). It also writes heldout_prompts.jsonl, which
has each held-out prompt once, for `evaluate`, and leaves out long ones on request.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARTS = ("policy", "judge", "heldout")


def part_of(prompt: Any, shares: tuple[float, float, float] = (0.35, 0.35, 0.3), seed: int = 0) -> str:
    """Which of `PARTS` the prompt (a string, or chat messages) belongs to."""
    digest = hashlib.sha256(json.dumps([seed, prompt]).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    return PARTS[0] if place < shares[0] else PARTS[1] if place < shares[0] + shares[1] else PARTS[2]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl or .jsonl.gz file that has a `prompt` in every row."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if "prompt" not in row:
                raise SystemExit(f"{path}:{number}: no `prompt` in the row; splitting by prompt needs it")
            yield row


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cut a preference file into policy, judge and held-out prompts.")
    parser.add_argument("file", type=Path, help=".jsonl or .jsonl.gz, a `prompt` in every row")
    parser.add_argument("--out", type=Path, required=True, help="folder for the four files")
    parser.add_argument(
        "--shares", type=float, nargs=3, default=(0.35, 0.35, 0.3), metavar=PARTS, help="of the prompts"
    )
    parser.add_argument("--longest", type=int, help="characters of a prompt in heldout_prompts.jsonl, at most")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another cut")
    options = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for row in read(options.file):
        rows[part_of(row["prompt"], tuple(options.shares), options.seed)].append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        prompts = {json.dumps(row["prompt"]) for row in rows[part]}
        print(
            f"{options.out / (part + '.jsonl')}: {write(options.out / (part + '.jsonl'), rows[part])} rows, "
            f"{len(prompts)} prompts"
        )
    held_out = {json.dumps(row["prompt"]): {"prompt": row["prompt"]} for row in rows["heldout"]}
    short = [row for text, row in held_out.items() if options.longest is None or len(text) <= options.longest]
    print(f"{options.out / 'heldout_prompts.jsonl'}: {write(options.out / 'heldout_prompts.jsonl', short)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
