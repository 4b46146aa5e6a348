"""What `make gpu-check` runs: everything that only a machine with a GPU can tell, in one go and under ten minutes.

    python tests/gpu/check.py

Takes the Python it is run with and what is installed there, and fetches nothing. Builds the extension in this checkout
for the GPUs at hand, in place of the one that was built there, runs tests/gpu, compute-sanitizer over the kernels at
small sizes, and the benchmark without its sweeps. A stage that fails, or is stopped at its time limit, does not keep
the later ones from running. Logs and the benchmark's numbers are left in runs/gpu-check/. Exit code: 0 all well, 1 a
stage failed, 2 nothing could be run here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "gpu-check"
TOTAL = 590.0  # seconds for everything
SUMMARY = re.compile(r"^=+ (?:(?:ERROR|RACECHECK) SUMMARY: )?(.*?)(?: =+)?$")

# In a process of its own: asking a GPU takes some of its memory for as long as the process lives.
PROBE = """
import importlib.util, json
facts = {"missing": [n for n in ("numpy", "torch", "transformers", "lightning", "pytest", "setuptools")
                     if importlib.util.find_spec(n) is None]}
if "torch" not in facts["missing"]:
    import torch
    from torch.utils import cpp_extension
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts |= {
        "torch": torch.__version__, "cuda": torch.version.cuda, "cuda_home": cpp_extension.CUDA_HOME,
        "ninja": cpp_extension.is_ninja_available(), "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "capabilities": [torch.cuda.get_device_capability(i) for i in range(count)],
        "gigabytes": [torch.cuda.get_device_properties(i).total_memory / 1e9 for i in range(count)],
    }
print(json.dumps(facts))
"""


@dataclass
class Stage:
    """A command with a limit on its time, and what became of it."""

    name: str
    command: list[str]
    limit: float  # seconds
    least: float = 0.0  # seconds that no earlier stage may take from it
    variables: dict[str, str] = field(default_factory=dict)
    fine: tuple[int, ...] = (0,)  # exit codes
    result: str = ""  # ok, FAILED ..., or NOT RUN ...
    seconds: float = 0.0
    last_words: str = ""

    def run(self, until: float) -> None:
        """Run it, its output on the terminal and in its log; stopped at its limit, or ``until`` if that is earlier."""
        print(f"\n=== {self.name}: {' '.join(self.command)}", flush=True)
        limit = min(self.limit, until - time.monotonic())
        if limit < 1:
            self.result = "FAILED: no time was left for it"
            return
        log = FOLDER / f"{self.name}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "PYTHONUNBUFFERED": "1",
            **self.variables,
        }
        began = time.monotonic()
        # A session of its own, so that all that it started can be stopped with it.
        process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        tee = subprocess.Popen(["tee", str(log)], stdin=process.stdout)
        assert process.stdout is not None
        process.stdout.close()  # tee has it
        try:
            code = process.wait(limit)
            self.result = "ok" if code in self.fine else f"FAILED: exit code {code}"
        except subprocess.TimeoutExpired:
            self.result = f"FAILED: stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            try:
                tee.wait(5)
            except subprocess.TimeoutExpired:  # something that left the session still holds the pipe
                tee.kill()
                tee.wait()
        self.seconds = time.monotonic() - began
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.last_words = SUMMARY.sub(r"\1", lines[-1]) if lines else ""
        if self.name.startswith("sanitizer") and "Device not supported" in text:
            self.result = "NOT RUN: compute-sanitizer does not support this device"


def probe() -> dict[str, Any]:
    """What this Python has, and which GPUs it sees."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{sys.executable} cannot import torch:\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def obstacles(facts: dict[str, Any]) -> list[str]:
    """Why nothing can be run here, each with its remedy; empty where it can."""
    if facts["missing"]:
        return [f"{sys.executable} has no {', '.join(facts['missing'])}: choose another one with PYTHON=..."]
    found = []
    if facts["cuda"] is None:
        found.append(f"torch {facts['torch']} is a CPU build: install one that is built with CUDA")
    if not facts["gpus"]:
        found.append("no GPU: torch.cuda.is_available() is False")
    if facts["cuda"] is None:
        pass  # torch looks for no nvcc then
    elif facts["cuda_home"] is None:
        found.append("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit")
    elif (release := nvcc_release(facts["cuda_home"])) is None:
        found.append(f"no nvcc in {facts['cuda_home']}/bin: set CUDA_HOME to a whole CUDA toolkit")
    elif release.split(".")[0] != facts["cuda"].split(".")[0]:
        found.append(f"nvcc is of CUDA {release}, torch is built with {facts['cuda']}: set CUDA_HOME to a matching one")
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        found.append("no C++ compiler: install g++, or name one in CXX")
    return found


def nvcc_release(home: str) -> str | None:
    """For example 12.8; None where there is no nvcc."""
    with contextlib.suppress(OSError):
        done = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False)
        if match := re.search(r"release ([\d.]+)", done.stdout):
            return match[1]
    return None


def find_sanitizer(home: str) -> str | None:
    """compute-sanitizer, which a CUDA toolkit keeps beside nvcc or in a folder of its own."""
    folders = [os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def plan(facts: dict[str, Any]) -> list[Stage]:
    """The stages, in order."""
    python = sys.executable
    architectures = sorted({f"{major}.{minor}" for major, minor in facts["capabilities"]})
    build = {
        "RLHF_LIGHTNING_BUILD": "required",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(architectures)),
        "CUDA_HOME": facts["cuda_home"],
    }
    # A folder of its own for the object files: those of another torch may lie in build/.
    builder = [python, "setup.py", "build_ext", "--inplace", "--build-temp", "build/gpu-check"]
    # Warnings of libraries whose versions nobody pinned here are no failures.
    tests = [python, "-m", "pytest", "tests/gpu", "-q", "-rs", "--durations=5", "-W", "ignore"]
    stages = [
        Stage("build", builder, 240, 240, build),
        Stage("info", [python, "-c", "import rlhf_lightning.cli.info as i; raise SystemExit(i.main([]))"], 30, 15),
        Stage("tests", tests, 240, 90),
    ]
    # A kernel that is missing must not be made up for by PyTorch, with nothing of ours to watch.
    native = {"RLHF_LIGHTNING_OPS": "native"}
    small = [python, "tests/gpu/small_kernels.py"]
    stages.append(Stage("kernels", [*small, "--names"], 40, 25, native))
    sanitizer = find_sanitizer(facts["cuda_home"])
    # Of float16 and float64 racecheck would see what it has seen of bfloat16 and float32, with the time of all.
    for tool, dtypes in (("memcheck", []), ("racecheck", ["float32", "bfloat16"])):
        if sanitizer is None:
            stages.append(Stage(f"sanitizer-{tool}", [], 0, result="NOT RUN: compute-sanitizer is not installed here"))
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=rlhf_lightning"]
        # Every tensor in an allocation of its own, or a step beyond one would fall into another and not be seen.
        alone = {**native, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        stages.append(Stage(f"sanitizer-{tool}", [*command, *small, *dtypes], 90, 45, alone))
    numbers = str(FOLDER / "benchmark.json")
    bench = [python, "benchmarks/bench_operators.py", "--device", "cuda", "--no-sweeps", "--json", numbers]
    # 3: a peer could not run. Nothing is fetched here, so peers are there only where somebody has set them up.
    stages.append(Stage("benchmark", bench, 300, 120, fine=(0, 3)))
    return stages


def main() -> int:
    began = time.monotonic()
    facts = probe()
    if found := obstacles(facts):
        print("gpu-check cannot run here:\n" + "\n".join(f"- {line}" for line in found), file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    gpus = ", ".join(
        f"{name} ({size:.0f} GB, {major}.{minor})"
        for name, size, (major, minor) in zip(facts["gpus"], facts["gigabytes"], facts["capabilities"], strict=True)
    )
    about = f"torch {facts['torch']}, nvcc {nvcc_release(facts['cuda_home'])}, Python {sys.version.split()[0]}; {gpus}"
    print(about)
    if not facts["ninja"]:
        print("no ninja: the build compiles one file after the other and may reach its time limit; install ninja")
    stages = plan(facts)
    for place, stage in enumerate(stages):
        if not stage.result:
            stage.run(began + TOTAL - sum(later.least for later in stages[place + 1 :]))
    print(f"\n=== gpu-check, {time.monotonic() - began:.0f} s: {about}")
    for stage in stages:
        print(f"{stage.name:<20} {stage.seconds:5.0f} s  {stage.result:<8} {stage.last_words}")
    print(f"logs and numbers: {FOLDER.relative_to(ROOT)}")
    return int(any(stage.result.startswith("FAILED") for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
