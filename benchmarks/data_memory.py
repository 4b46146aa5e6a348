"""How much memory and time ``data check`` and ``fit`` take for each row of a file.

    python benchmarks/data_memory.py [--rows 10000 100000 1000000] [--json FILE]

Rows are preference pairs of 60 words, about 300 bytes each; the tokenizer has one token a word. Each command runs once
for each file, in a process of its own: ``data check`` with and without a tokenizer, and a ``fit`` of DPO that ends
after its first step. Memory is the peak of the resident set. What the same command takes for 1,000 rows is taken off,
and the rest divided by the rows.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import report

sys.path.insert(0, str(report.ROOT / "tests"))  # the tiny model

FEWEST = 1_000
_MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def commands(rows: int) -> dict[str, list[str]]:
    """The commands by name."""
    ours, file = [sys.executable, "-m", "rlhf_lightning"], f"{rows}.jsonl"
    fit = {"model.model": "policy", "data.path": file, "trainer.max_steps": 1, "trainer.accelerator": "cpu"}
    fit |= {"trainer.limit_val_batches": 1, "trainer.num_sanity_val_steps": 0, "run": f"fit-{rows}"}
    options = [part for name, value in fit.items() for part in (f"--{name}", str(value))]
    return {
        "data check": [*ours, "data", "check", file],
        "data check --tokenizer": [*ours, "data", "check", file, "--tokenizer", "policy"],
        "fit": [*ours, "fit", "--config", "dpo.yaml", *options],
    }


def write_rows(path: Path, rows: int) -> None:
    """The file of pairs."""
    from tiny_models import WORDS

    words = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            sides = {key: " ".join(words.choices(WORDS, k=24)) for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": " ".join(words.choices(WORDS, k=12)), **sides}) + "\n")


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """The peak memory in bytes, and the seconds."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _MEASURED, *command], cwd=folder, stdout=subprocess.PIPE, check=True)
    return {"bytes": int(done.stdout) * 1024, "seconds": time.monotonic() - began}


def plot(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Memory over rows, a line for each command."""
    pyplot = report.pyplot()
    if pyplot is None:
        return
    figure, panel = pyplot.subplots(figsize=(7, 4.2))
    for name, of in found.items():
        panel.plot(list(of), [each["bytes"] / 1e9 for each in of.values()], marker="o", label=name)
    panel.set_xlabel("rows (pairs of 300 bytes)")
    panel.set_ylabel("peak of the resident memory, GB")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_ylim(0)
    panel.legend(frameon=False)
    report.tidy(panel)
    report.save_plot(figure, path, 1.0)


def main() -> int:
    """Measure and write."""
    parser = report.parser(__doc__, device=False)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the files")
    options = parser.parse_args()
    facts = report.about("cpu", options.threads)
    import torch
    from tiny_models import make_config, make_tokenizer
    from transformers import LlamaForCausalLM

    found: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        torch.manual_seed(0)
        LlamaForCausalLM(make_config()).save_pretrained(folder / "policy")
        make_tokenizer("<pad>").save_pretrained(folder / "policy")
        for rows in (FEWEST, *options.rows):
            write_rows(folder / f"{rows}.jsonl", rows)
            for name, command in commands(rows).items():
                found.setdefault(name, {})[rows] = measured(command, folder)
                print(f"{name}, {rows:,} rows: {found[name][rows]}", flush=True)
            (folder / f"{rows}.jsonl").unlink()
    table = [["command", "rows", "KB a row", "microseconds a row"]]
    for name, of in found.items():
        for rows, each in of.items():
            if rows > FEWEST:
                more = {key: (each[key] - of[FEWEST][key]) / rows for key in each}
                numbers = [f"{more['bytes'] / 1e3:.2f}", f"{more['seconds'] * 1e6:.0f}"]
                table.append([name, f"{rows:,}", *numbers])
    results: dict[str, Any] = {"about": facts, "peak_by_rows": found}
    path = options.json or report.RESULTS / f"data_memory_{report.slug(facts)}.json"
    report.write(results, path, "Memory and time for each row of data", report.markdown(table))
    plot(found, path.with_suffix(".png"))
    print(report.closing({}, path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
