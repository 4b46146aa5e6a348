"""Every csrc/*.cu compiles for each architecture that is supported, and no kernel of it needs local memory."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from torch.utils.cpp_extension import BuildExtension

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_resources  # noqa: E402

NVCC = cuda_resources.find_tool("nvcc")
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
def kernels(tmp_path_factory):
    """All files' kernels, compiled once."""
    if NVCC is None:
        message = "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
        if os.environ.get("CI"):
            pytest.fail(f"{message}: the CUDA sources went unchecked")
        pytest.skip(message)
    return cuda_resources.compile_all(NVCC, cuda_resources.ARCHITECTURES, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=lambda path: path.name)
def test_compiles_for_every_architecture_without_local_memory(kernels, source):
    found = kernels[source.name]
    assert {kernel.architecture for kernel in found} == set(cuda_resources.ARCHITECTURES)
    local = [kernel for kernel in found if kernel.stack or kernel.spill_stores or kernel.spill_loads]
    assert not local, cuda_resources.table(local)


def test_every_operator_has_its_file():
    assert cuda_resources.SOURCES, "no CUDA source was found, so none was checked"


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
