"""The demo over sizes, seeds and thread counts: does it come out well wherever it is run?

    python benchmarks/demo_table.py [--sizes quick full] [--seeds 0 1 ... 9] [--threads 1 2] [--json FILE] [--page]

Each run is `python -m rlhf_lightning demo` in a process of its own; another number of threads adds floating-point
numbers in another order, and so stands for another machine. A result is written as soon as it is there, with its commit
and the fingerprint of the recipe (configs/demo and the demo's own sources); what FILE has of this recipe is not run
again, so the script can be ended and started anew. Two runs go side by side, and threads that wait leave their core to
others: the seconds that a run takes are for an idle machine, and not measured here.

The table in docs/demo.md is made from FILE, after every run and by `--page` alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from harness import report
from harness.report import ROOT

from rlhf_lightning.demo import stages

FILE = ROOT / "benchmarks" / "results" / "demo_table.json"
PAGE = ROOT / "docs" / "demo.md"
BEGIN, END = "<!-- made by benchmarks/demo_table.py -->\n", "<!-- until here -->\n"
SIZES = ("quick", "full")
SEEDS, THREADS = range(10), (1, 2)
LABELS = {"quick": "`demo --quick`", "full": "`demo`"}
# What is promised: PPO's win rate on average and in the worst run, and its KL.
PROMISED = {"quick": {"mean": 0.75, "worst": 0.65}, "full": {"mean": 0.88, "worst": 0.80, "kl": 15.0}}
_written = threading.Lock()


def recipe(size: str) -> str:
    """A fingerprint of what a demo trains: the values of its configs and size, and the sources of its world.

    Comments, and code that only carries the recipe out, do not count.
    """
    configs = sorted((ROOT / "configs" / "demo").glob("*.yaml"))
    values = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in configs}
    values |= {size: vars({"full": stages.FULL, "quick": stages.QUICK}[size])}
    values |= {name: getattr(stages, name) for name in _NUMBERS}
    world = [_without_words(ROOT / "rlhf_lightning" / "demo" / f"{name}.py") for name in _WORLD]
    return hashlib.sha256(json.dumps([values, world], sort_keys=True).encode()).hexdigest()[:12]


def _without_words(source: Path) -> str:
    """The syntax tree of a file without docstrings; a tree has no comments."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


_WORLD = ("corpus", "gold", "start")
_NUMBERS = ("MAX_NEW_TOKENS", "TEMPERATURE", "VOCABULARY", "ANNOTATOR_LAPSE")


def name_of(size: str, seed: int, threads: int) -> str:
    """The key of a run in the file."""
    return f"{size} seed {seed} threads {threads}"


def missing(results: dict[str, Any], wanted: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The runs that the file does not have of this recipe."""
    runs, recipes = results["runs"], results["recipe"]
    return [task for task in wanted if runs.get(name_of(*task), {}).get("recipe") != recipes[task[0]]]


def run(size: str, seed: int, threads: int) -> dict[str, Any]:
    """One demo from start to end, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf_lightning", "demo", "--seed", str(seed), "--out", f"{folder}/demo"]
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with open(f"{folder}/output", "w+", encoding="utf-8") as output:
            arguments = [*command, *(["--quick"] if size == "quick" else [])]
            process = subprocess.Popen(arguments, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                output.seek(0)
                raise SystemExit(f"{' '.join(arguments)} failed:\n{output.read()[-2000:]}")
        told = json.loads(Path(folder, "demo", "report.json").read_text(encoding="utf-8"))
    kept = {key: told[key] for key in ("warnings", "sft", "reward_model", "ppo", "dpo")}
    return {**kept, "cpu_seconds": round(used.ru_utime, 1)}


def keep(results: dict[str, Any], path: Path, name: str, found: dict[str, Any]) -> None:
    """Put one result into the file, whole or not at all."""
    facts = report.about("cpu", 1)
    own = {key: facts[key] for key in ("date", "commit", "changed", "cpu", "cores", "python", "torch")}
    with _written:
        results["runs"][name] = {"recipe": results["recipe"][name.split()[0]], **own, **found}
        results["runs"] = dict(sorted(results["runs"].items()))
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".new")
        staged.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        staged.replace(path)
    ppo = found["ppo"]
    print(f"{name}: win rate {ppo['win_rate_vs_sft']:.3f}, KL {ppo['kl']:.1f}", flush=True)


def table(results: dict[str, Any]) -> str:
    """What the page shows: how many runs there are, the summary of each size, and every run."""
    text = []
    for size in SIZES:
        now = results["recipe"][size]
        own = {k: run for k, run in results["runs"].items() if k.startswith(f"{size} ") and run["recipe"] == now}
        if own:
            text += [*_summary(size, own), "", *_rows(own), ""]
    return "\n".join(text)


def _summary(size: str, runs: dict[str, dict[str, Any]]) -> list[str]:
    rates = [found["ppo"]["win_rate_vs_sft"] for found in runs.values()]
    kls = [found["ppo"]["kl"] for found in runs.values()]
    promised = PROMISED[size]
    bounds = f"promised: {promised['mean']:.2f} on average, none below {promised['worst']:.2f}"
    bounds += f", KL at most {promised['kl']:.0f}" if "kl" in promised else ""
    commits = sorted({found["commit"] + " and changes" * found["changed"] for found in runs.values()})
    warned = sum(any(line.startswith("PPO") for line in found["warnings"]) for found in runs.values())
    told = (
        f"**{LABELS[size]}**, {len(runs)} of {len(SEEDS) * len(THREADS)} runs: PPO's win rate over SFT is "
        f"{statistics.fmean(rates):.3f} on average and {min(rates):.3f} in the worst run ({bounds}). Its KL is "
        f"{max(kls):.1f} nats at most, and it exploits the reward model in {warned or 'none'} of them. Commit "
        f"{', '.join(commits)}."
    )
    return textwrap.wrap(told, 120, break_on_hyphens=False)


def _rows(runs: dict[str, dict[str, Any]]) -> list[str]:
    head = ["seed", "threads", "PPO win rate", "KL", "gold reward, SFT → PPO", "DPO win rate", "KL"]
    rows = [[*head, "reward accuracy / ceiling", "CPU, s"]]
    for key, found in sorted(runs.items(), key=lambda item: (int(item[0].split()[2]), item[0])):
        _, _, seed, _, threads = key.split()
        ppo, dpo, model = found["ppo"], found["dpo"], found["reward_model"]
        low, high = ppo["win_rate_ci"]
        cells = [seed, threads, f"{ppo['win_rate_vs_sft']:.3f} [{low:.3f}, {high:.3f}]", f"{ppo['kl']:.1f}"]
        cells += [f"{found['sft']['gold_reward']:.2f} → {ppo['gold_reward']:.2f}", f"{dpo['win_rate_vs_sft']:.3f}"]
        cells += [f"{dpo['kl']:.1f}", f"{model['accuracy']:.3f} / {model['label_ceiling']:.3f}"]
        rows.append([*cells, f"{found['cpu_seconds']:.0f}"])
    return report.markdown(rows, left=len(rows[0]))


def write_page(results: dict[str, Any], page: Path) -> None:
    """Replace the table in the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Make the runs that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--json", type=Path, default=FILE)
    parser.add_argument("--page", action="store_true", help="make the table of what is there, and run nothing")
    options = parser.parse_args()
    kept = json.loads(options.json.read_text(encoding="utf-8"))["runs"] if options.json.exists() else {}
    results = {"recipe": {size: recipe(size) for size in SIZES}, "runs": kept}

    def do(task: tuple[str, int, int]) -> None:
        keep(results, options.json, name_of(*task), run(*task))

    for place in range(0, 0 if options.page else len(options.seeds), 2):  # two seeds at a time, so that both sizes grow
        for threads in options.threads:
            seeds = options.seeds[place : place + 2]
            tasks = missing(results, [(size, seed, threads) for size in options.sizes for seed in seeds])
            with ThreadPoolExecutor(max_workers=2) as workers:
                list(workers.map(do, tasks))
            if options.json == FILE:
                write_page(results, PAGE)
    if options.json == FILE:
        write_page(results, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
