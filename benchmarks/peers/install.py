"""Sets up the libraries that the benchmarks compare with, each in a folder of its own, outside this environment.

    python benchmarks/peers/install.py [--device cpu|cuda] [NAME ...]

Each NAME.txt beside this file lists one library with what it needs beyond this project's environment; it is installed
to build/peers/NAME, which only the process that runs that library has on its path. torch and the rest come from the
environment. Without a network, give pip a folder of wheels: ``PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels``. What cannot be
installed is noted with pip's reason, and the benchmarks name it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLED = HERE.parent.parent / "build" / "peers"
FOR = {"cpu": ("trl", "trl_ppo", "verl"), "cuda": ("trl", "trl_ppo", "verl", "liger", "cce", "flash_attn")}
# flash-attn's own switches: no CUDA kernels, and no download of somebody's build of them.
WITHOUT_KERNELS = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "FLASH_ATTENTION_FORCE_BUILD": "TRUE"}


def missing(folder: str | None) -> str | None:
    """Why there is nothing to start in the peer's folder; None where there is, or where no folder is asked for."""
    if folder is None or (INSTALLED / folder).is_dir():
        return None
    reason = INSTALLED / f"{folder}.failed"
    if reason.exists():
        return "not installed: " + reason.read_text(encoding="utf-8").strip()
    return f"not installed: python benchmarks/peers/install.py {folder}"


def install(name: str) -> str | None:
    """None, or the reason why ``build/peers/name`` could not be made."""
    target, note = INSTALLED / name, INSTALLED / f"{name}.failed"
    unfinished = INSTALLED / f"{name}.unfinished"
    for old in (target, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    note.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", str(unfinished), "-r", str(HERE / f"{name}.txt")]
    done = subprocess.run(command, env={**os.environ, **WITHOUT_KERNELS}, capture_output=True, text=True)
    if done.returncode == 0:
        unfinished.rename(target)
        return None
    shutil.rmtree(unfinished, ignore_errors=True)
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("ERROR")]
    reason = errors[0] if errors else (done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"])[-1]
    INSTALLED.mkdir(parents=True, exist_ok=True)
    note.write_text(reason + "\n", encoding="utf-8")
    return reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(FOR), default="cpu", help="whose peers, where none is named")
    parser.add_argument("names", nargs="*", metavar="NAME")
    chosen = parser.parse_args()
    names = chosen.names or FOR[chosen.device]
    unknown = [name for name in names if not (HERE / f"{name}.txt").exists()]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(FOR['cuda'])}")
    reasons = {name: install(name) for name in names}
    for name, reason in reasons.items():
        print(f"{name}: {'installed' if reason is None else reason}")
    return 1 if any(reasons.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
