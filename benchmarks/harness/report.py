"""The one report: where and how a benchmark ran, its options, tables, files and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FAILED, NO_PEER = 1, 3  # exit codes, beside 0
BESIDE = "write the numbers here, and a page beside it"
CODES = """\
Exit codes: 0 all that was asked for was measured; 1 ours could not be; 2 the options are wrong; 3 ours was, but a peer
that was asked for could not run. What was measured is written in any case, and a peer that is missing named with the
reason."""
# One colour for each of few lines, told apart by markers too; ours is the strongest.
STYLES = (("#1b5e9c", "o"), ("#d1782c", "s"), ("#5f9e6e", "^"), ("#8c6bb1", "D"))


def parser(about: str | None, json_help: str = BESIDE, device: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have: where it runs, on how many threads, and where the results go."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--json", type=Path, help=json_help)
    if device:
        found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return found


def exit_code(ours_failed: bool, missing: Collection[str]) -> int:
    """The command's; ``missing``: the peers that were asked for and could not run, which are said again."""
    if missing:
        print(f"asked for, and could not run: {', '.join(missing)}", file=sys.stderr)
    return FAILED if ours_failed else NO_PEER if missing else 0


def about(device: str, threads: int) -> dict[str, Any]:
    """The facts of this process's run, as they stand in every file of results; ends it where the device is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{Path(sys.argv[0]).stem}: no GPU that torch can use")
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_portable, sys.argv[1:])]),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        # Results and pages are what a benchmark writes, and change nothing that it measures.
        "changed": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        ),
        "device": device,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["gpu_l2_mib"] = round(properties.L2_cache_size / 2**20)
        facts["cuda"] = torch.version.cuda
    return facts


def header(facts: dict[str, Any], path: Path) -> list[str]:
    """The facts as the head of the page beside ``path``, which holds the numbers."""
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['cpu_capability']}"
    if "gpu" in facts:
        machine = f"{facts['gpu']}, {facts['gpu_memory_gib']} GiB, CUDA {facts['cuda']}; {machine}"
    commit = facts["commit"] + (" and changes not yet committed" if facts["changed"] else "")
    return [
        f"{machine}. torch {facts['torch']}, Python {facts['python']}, commit {commit}, {facts['date']}.",
        f"All numbers: `{path.name}`. Made by",
        "",
        *(f"    {command}" for command in facts.get("commands") or facts["command"].splitlines()),
    ]


def slug(facts: dict[str, Any]) -> str:
    """Hardware and date, fit for a file's name."""
    name = facts.get("gpu") or f"{facts['cpu']} {facts['cores']} cores"
    words = re.sub(r"\(\w+\)|@.*", " ", name).lower()
    return re.sub(r"[^a-z0-9]+", "_", words).strip("_") + "_" + facts["date"]


def _portable(argument: str) -> str:
    """An absolute path (also behind ``--option=``) relative to the repository's root, or its last name outside it."""
    option, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    return option + sign + (str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# Tables and files


def number(value: float | None) -> str:
    """Three digits, however large."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The rows' lines, the header first; all columns but the first ``left`` are numbers."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return [lines[0], "|" + "---|" * left + "---:|" * (len(rows[0]) - left), *lines[1:]]


def write(results: dict[str, Any], path: Path, title: str, *parts: str | Sequence[str]) -> None:
    """The JSON at ``path``, and beside it a page: title, facts and the parts that are not empty.

    A part is prose to be filled, or lines as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    blocks = [[f"# {title}"], header(results["about"], path)]
    blocks += [[textwrap.fill(part, 120)] if isinstance(part, str) else list(part) for part in parts if part]
    path.with_suffix(".md").write_text("\n\n".join("\n".join(block) for block in blocks) + "\n", encoding="utf-8")


def closing(missing: dict[str, str], path: Path | None, nothing: str = "no --json") -> str:
    """The last lines on the terminal."""
    lines = [f"missing: {name}: {reason}" for name, reason in missing.items()]
    return "\n".join([*lines, f"written: {path} and the page beside it" if path else f"nothing written: {nothing}"])


# Plots


def pyplot() -> Any:
    """matplotlib's, drawing to files; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plots: matplotlib is missing; run: pip install 'rlhf-lightning[plot]'", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def tidy(panel: Any) -> None:
    """A light grid, and no frame above and on the right."""
    panel.minorticks_off()
    panel.grid(True, color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def save_plot(figure: Any, path: Path, top: float) -> Path:
    """The figure at ``path``, which is given back; the panels end at the share ``top`` of the height."""
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=120)
    figure.clear()
    return path
