"""The operators' tests with a library that finds bad memory accesses and undefined behaviour: `make test-sanitizers`.

The library is built from the sources in this checkout, in a folder of its own, with GCC's address and undefined
sanitizers; the first finding ends the process that made it. The library of the checkout stays as it is. The CUDA
kernels have their own, in `make gpu-check`. `.ci/run` does not run it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
# Not here: what runs no C++ of ours, what compiles it again, and what needs more memory than is left beside the shadow.
LEFT_OUT = ("cuda", "setup", "rebuild", "large_memory", "past_2_31")

# The tests would also pass with the plain operators, and with another library.
LOADED = """
from pathlib import Path
from rlhf_lightning.ops import extension
assert extension.LOADED and Path(extension.__file__).is_relative_to(Path.cwd()), extension.__file__
assert b"__asan_report_load" in next(Path("rlhf_lightning").glob("_C*.so")).read_bytes()
"""


def library(name: str) -> str:
    """The path of one of GCC's own libraries."""
    said = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def main() -> int:
    """Build and test; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copied = ("rlhf_lightning", "csrc", "configs", "tests", "docs", "setup.py", "pyproject.toml")
        for name in (*copied, "README.md", "CONTRIBUTING.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
            else:
                shutil.copy2(source, folder / name)
        env = {**os.environ, "PYTHONPATH": str(folder)}
        build = {**env, "CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS, "RLHF_LIGHTNING_BUILD": "required"}
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=build, check=True)
        env["LD_PRELOAD"] = " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so")))
        # Python itself leaks by design. A torch that throws through a sanitized frame needs the check for C++ only.
        env["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1"
        env["UBSAN_OPTIONS"] = "print_stacktrace=1:abort_on_error=1"
        subprocess.run([sys.executable, "-c", LOADED], cwd=folder, env=env, check=True)
        chosen = [
            f"tests/ops/{path.name}"
            for path in sorted((folder / "tests" / "ops").glob("test_*.py"))
            if not any(word in path.name for word in LEFT_OUT)
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *chosen, *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
