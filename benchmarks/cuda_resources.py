"""What do the CUDA kernels ask of a GPU? Registers, local and shared memory, and the width of their loads and stores.

    python benchmarks/cuda_resources.py [--architectures 80 90 100] [--markdown FILE]

Compiles every csrc/*.cu with nvcc, as setup.py does, and prints a Markdown table, one line a kernel.
No GPU is needed. Registers, stack and spills are what ptxas reports; the last two columns count the instructions of the
machine code that load and store 16 bytes of global memory at a time, out of all that touch global memory, and need
cuobjdump and nvdisasm (of the CUDA toolkit, or the Python packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import report
from harness.report import ROOT
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")


@dataclass
class Kernel:
    """A kernel of one architecture, as ptxas reports it."""

    file: str
    name: str  # mangled
    architecture: str  # 90, or 90a
    registers: int = 0
    stack: int = 0  # bytes of local memory a thread has for what it indexes or passes by address
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    shared: int = 0  # bytes a block has, beside what a launch asks for
    accesses: Counter[str] | None = None  # see `read_sass`

    def wide(self, instruction: str) -> str:
        found = self.accesses
        return "?" if found is None else f"{found[f'wide {instruction}']} of {found[instruction]}"


def find_tool(name: str, package: str | None = None) -> Path | None:
    """A program of the CUDA toolkit: from PATH, CUDA_HOME, the usual folder, or an installed Python package."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)])
    if found := shutil.which(name, path=path):
        return Path(found)
    try:
        files = importlib.metadata.files(package) if package else None
    except importlib.metadata.PackageNotFoundError:
        files = None
    inside = [Path(str(file.locate())) for file in files or () if file.name == name]
    return next((file for file in inside if os.access(file, os.X_OK)), None)


def nvcc_flags() -> list[str]:
    """Those of setup.py, and those that torch adds to every extension; C++17 is what torch 2.10 compiles as."""
    own = re.search(r"^NVCC_FLAGS = (\[.*\])$", (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert own is not None
    return [*COMMON_NVCC_FLAGS, "-std=c++17", "-Xcompiler", "-fPIC", *ast.literal_eval(own[1])]


def compile_file(nvcc: Path, source: Path, architectures: Sequence[str], output: Path) -> list[Kernel]:
    """Compile one file for all architectures at once; its kernels with what ptxas says of them.

    Raises: RuntimeError with the compiler's words when it fails, or warns.
    """
    targets = [word for a in architectures for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    command = [str(nvcc), "-c", str(source), "-o", str(output), *nvcc_flags(), "-Xptxas", "-v", *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0 or re.search(r"\bwarning\b", said, flags=re.IGNORECASE):
        raise RuntimeError(f"{' '.join(command)}\n{said}")
    return parse_ptxas(source.name, said)


def parse_ptxas(file: str, text: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` prints; a function that was not inlined counts to the kernel above it."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernels.append(Kernel(file, match[1], match[2]))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            kernels[-1].stack += stack
            kernels[-1].spill_stores += stores
            kernels[-1].spill_loads += loads
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def compile_all(nvcc: Path, architectures: Sequence[str], folder: Path, jobs: int = 2) -> dict[str, list[Kernel]]:
    """Every source's kernels, by the source's name; the object files are left in ``folder``. Raises RuntimeError."""

    def one(source: Path) -> list[Kernel]:
        return compile_file(nvcc, source, architectures, folder / f"{source.stem}.o")

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip((source.name for source in SOURCES), pool.map(one, SOURCES), strict=True))


def read_sass(cuobjdump: Path, nvdisasm: Path, file: Path) -> dict[tuple[str, str], Counter[str]]:
    """How many instructions of an object file touch global memory, by kernel and architecture.

    They are ``LDG`` and ``STG``; those that move 16 bytes a thread are counted as ``wide LDG`` and ``wide STG``, too.
    """
    path = os.pathsep.join([str(nvdisasm.parent), os.environ.get("PATH", "")])  # cuobjdump runs nvdisasm
    text = output_of([str(cuobjdump), "-sass", str(file)], env={**os.environ, "PATH": path})
    found: dict[tuple[str, str], Counter[str]] = {}
    architecture = ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            accesses = found[match[1], architecture] = Counter()
        elif match := re.search(r"\b(LDG|STG)\.([\w.]+)", line):
            accesses[match[1]] += 1
            accesses[f"wide {match[1]}"] += "128" in match[2].split(".")
    return found


def output_of(command: Sequence[str], **options: Any) -> str:
    """What a command prints, which must succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def readable(names: Sequence[str]) -> dict[str, str]:
    """Mangled names as a person would write them: no namespaces and no arguments."""
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None or not names:
        return {name: name for name in names}
    short = {}
    for name, line in zip(names, output_of([filt], input="\n".join(names)).splitlines(), strict=True):
        line = re.sub(r"rlhf_lightning::|\(anonymous namespace\)::|^void ", "", line)
        line = line.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
        depth, end = 0, len(line)
        for place, letter in enumerate(line):  # the arguments start at the first ( outside <>
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = place
                break
        short[name] = re.sub(r"\((?:int|bool|long)\)", "", line[:end])
    return short


def table(kernels: Sequence[Kernel]) -> str:
    """The kernels as a Markdown table; a cell has one value where the architectures agree, else one for each."""
    names = readable([kernel.name for kernel in kernels])
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.file, kernel.name), []).append(kernel)
    rows = [["kernel", "file", "registers", "stack", "spills", "shared", "16-byte loads", "16-byte stores"]]
    for (file, name), group in groups.items():
        cells = [
            (one.registers, one.stack, one.spill_stores + one.spill_loads, one.shared, one.wide("LDG"), one.wide("STG"))
            for one in group
        ]
        columns = [list(map(str, column)) for column in zip(*cells, strict=True)]
        rows.append([f"`{names[name]}`", file, *(c[0] if len(set(c)) == 1 else " / ".join(c) for c in columns)])
    lines = "\n".join(report.markdown(rows, left=len(rows[0])))
    return f"Where they differ: {' / '.join(f'sm_{a}' for a in architectures)}.\n\n{lines}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="N", help="80, 90a, ...")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    nvcc = find_tool("nvcc")
    if nvcc is None:
        sys.exit("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit")
    cuobjdump = find_tool("cuobjdump", "nvidia-cuda-cuobjdump")
    nvdisasm = find_tool("nvdisasm", "nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        kernels = [k for part in compile_all(nvcc, options.architectures, Path(folder)).values() for k in part]
        if cuobjdump is not None and nvdisasm is not None:
            for file in sorted(Path(folder).glob("*.o")):
                accesses = read_sass(cuobjdump, nvdisasm, file)
                for kernel in kernels:
                    if Path(kernel.file).stem == file.stem:
                        kernel.accesses = accesses[kernel.name, kernel.architecture]
        else:
            print("no cuobjdump or no nvdisasm: the machine code is not read", file=sys.stderr)
    release = re.search(r"release [\d.]+, V([\d.]+)", output_of([str(nvcc), "--version"]))
    facts = report.about("cpu", torch.get_num_threads())
    commit = facts["commit"] + (" and changes not yet committed" if facts["changed"] else "")
    text = (
        f"nvcc {release[1] if release else 'of unknown version'}, `{' '.join(nvcc_flags())}`, commit {commit}, "
        f"{facts['date']}. Made by\n\n    {facts['command']}\n\n{table(kernels)}"
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
