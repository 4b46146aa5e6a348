"""Where and how a benchmark ran: hardware, versions, commit, command and date."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def about(device: str, threads: int) -> dict[str, Any]:
    """The facts of this process's run, as they stand in every file of results."""
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
        f"    {facts['command']}",
        "",
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
