"""Every csrc/*.cu compiles for each architecture that is supported, and no kernel of it needs local memory; and every
csrc/*_cuda.cpp passes a C++ compiler with CUDA's headers, whatever torch is installed.

What compiled is kept in build/ for as long as nothing that it was made of changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from ops.cuda_emulation import COMPILER
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_resources  # noqa: E402

NVCC = cuda_resources.find_tool("nvcc")
TENSOR_SIDES = sorted((ROOT / "csrc").glob("*_cuda.cpp"))
SPILLING = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90a'
ptxas info    : Function properties for _Z1gPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read():
    f, g = cuda_resources.parse_ptxas("x.cu", SPILLING)
    assert (f.name, f.architecture, f.registers, f.shared) == ("_Z1fPf", "80", 255, 1024)
    assert (f.stack, f.spill_stores, f.spill_loads) == (40, 8, 12)
    assert (g.architecture, g.registers, g.shared, g.stack) == ("90a", 18, 0, 0)


@pytest.fixture(scope="module")
def nvcc():
    if NVCC is None:
        message = "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
        if os.environ.get("CI"):
            pytest.fail(f"{message}: the CUDA sources went unchecked")
        pytest.skip(message)
    return NVCC


@pytest.fixture(scope="module")
def tools(nvcc):
    """What the compilers and their headers say they are."""
    programs = [[nvcc], COMPILER]
    said = [subprocess.run([*p, "--version"], capture_output=True, text=True, check=True).stdout for p in programs]
    read = ("CPATH", "CPLUS_INCLUDE_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    variables = [os.environ.get(name) for name in read]
    return [*said, *map(str, programs), torch.__version__, *cpp_extension.include_paths(), *variables]


def kept(work: Callable[[], Any], source: Path, *made_of: object) -> Any:
    """What ``work``, which compiles ``source``, once gave; JSON. Nothing is kept of work that raises."""
    headers = sorted(p for p in (ROOT / "csrc").iterdir() if p.suffix in (".h", ".cuh"))
    programs = [Path(__file__), Path(cuda_resources.__file__)]
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in (source, *headers, *programs)]
    name = hashlib.sha256(repr((texts, made_of)).encode()).hexdigest()[:16]
    path = ROOT / "build" / "cuda_compiles" / f"{name}.json"
    if not path.exists():
        text = json.dumps(work())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_is_kept_is_made_again_when_a_source_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source, header, done = tmp_path / "csrc" / "x.cu", tmp_path / "csrc" / "x.h", []
    source.parent.mkdir()
    source.write_text("first")

    def work():
        done.append(len(done) + 1)
        return done

    def fails():
        raise RuntimeError("does not compile")

    assert [kept(work, source), kept(work, source)] == [[1], [1]]
    source.write_text("second")
    with pytest.raises(RuntimeError):
        kept(fails, source)
    assert [kept(work, source), kept(work, source)] == [[1, 2], [1, 2]]
    header.write_text("new")
    assert kept(work, source) == [1, 2, 3]
    assert kept(work, source, "another flag") == [1, 2, 3, 4]


# Each file on its own: processes that share the tests would each compile all of what one fixture gives.
@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=lambda path: path.name)
def test_compiles_for_every_architecture_without_local_memory(nvcc, tools, source, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_resources, "SOURCES", [source])

    def compile_it():
        kernels = cuda_resources.compile_all(nvcc, cuda_resources.ARCHITECTURES, tmp_path)
        return [asdict(kernel) for kernel in kernels[source.name]]

    rows = kept(compile_it, source, tools, cuda_resources.nvcc_flags(), cuda_resources.ARCHITECTURES)
    found = [cuda_resources.Kernel(**row) for row in rows]
    assert {kernel.architecture for kernel in found} == set(cuda_resources.ARCHITECTURES)
    local = [kernel for kernel in found if kernel.stack or kernel.spill_stores or kernel.spill_loads]
    assert not local, cuda_resources.table(local)


def test_every_operator_has_its_file():
    assert cuda_resources.SOURCES, "no CUDA source was found, so none was checked"
    assert TENSOR_SIDES, "no csrc/*_cuda.cpp was found, so none was checked"


def cuda_headers(nvcc):
    """The folder of CUDA's own headers, as nvcc names it."""
    said = subprocess.run([nvcc, "-v", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    words = shlex.split(next(line for line in said.stderr.splitlines() if "INCLUDES=" in line).partition("=")[2])
    folders = [Path(word.removeprefix("-I")) for word in words]
    return next(folder for folder in folders if (folder / "cuda_runtime_api.h").exists())


def syntax_errors(source, nvcc, folder):
    """What the C++ compiler has to say about a file. A torch without CUDA has the headers but for one of settings."""
    stub = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.touch()
    flags = ["-fsyntax-only", "-Wall", "-fopenmp", "-std=c++20"]
    system = [folder, cuda_headers(nvcc), *cpp_extension.include_paths()]
    done = subprocess.run(
        [*COMPILER, *flags, *(word for path in system for word in ("-isystem", str(path))), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.stderr or done.returncode == 0 else f"exit code {done.returncode}"


@pytest.mark.parametrize("source", TENSOR_SIDES, ids=lambda path: path.name)
def test_the_tensor_side_compiles(nvcc, tools, source, tmp_path):
    def compile_it():
        assert syntax_errors(source, nvcc, tmp_path) == ""

    kept(compile_it, source, tools)


def test_a_tensor_side_that_does_not_compile_is_seen(nvcc, tmp_path):
    source = tmp_path / "wrong_cuda.cpp"
    good = "#include <cuda_runtime_api.h>\n#include <c10/core/ScalarType.h>\nint element_type(c10::ScalarType type);\n"
    source.write_text(good)
    assert syntax_errors(source, nvcc, tmp_path / "good") == ""
    source.write_text(f"{good}int wrong() {{ return element_type(1.5, 2); }}\n")
    assert "element_type" in syntax_errors(source, nvcc, tmp_path)


def test_every_source_makes_an_object_file_of_its_own(monkeypatch):
    """The names that the compiler gives them are made of the stem alone, and gae.cpp and gae.cu have the same."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(BuildExtension, "build_extensions", lambda self: None)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    command = given["cmdclass"]["build_ext"](setuptools.Distribution())
    command.compiler = SimpleNamespace(object_filenames=lambda sources: [f"build/{Path(x).stem}.o" for x in sources])
    command.build_extensions()
    sources = [str(path) for pattern in ("*.cpp", "*.cu") for path in (ROOT / "csrc").glob(pattern)]
    objects = command.compiler.object_filenames(sources)
    assert len(set(objects)) == len(sources)
    assert len({Path(x).stem for x in sources}) < len(sources), "no two have the same stem: then this shows nothing"
