"""setup.py: what it leaves out where something is missing, and the note that it leaves of that."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from rlhf_lightning.ops import rebuild

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[[], dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs setup.py up to its call of setup(); returns its names, with the arguments of the call as "given"."""
    for name in ("RLHF_LIGHTNING_BUILD", "CXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)

    def go() -> dict[str, Any]:
        given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        return {**runpy.run_path("setup.py"), "given": given}

    return go


def cuda(monkeypatch: pytest.MonkeyPatch, home: Path | None) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")


def toolkit(folder: Path, release: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return folder


def test_without_a_compiler_nothing_is_built_and_the_note_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    found = run()
    assert found["given"]["ext_modules"] == []
    said = "no C++ compiler was found (/nowhere/g++); install one, such as g++, or name yours in CXX"
    assert found["MISSING"] == said
    monkeypatch.setenv("RLHF_LIGHTNING_BUILD", "required")
    with pytest.raises(SystemExit, match=r"RLHF_LIGHTNING_BUILD=required, but no C\+\+ compiler was found"):
        run()


def test_the_compiler_is_looked_for_on_the_path(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run()["MISSING"].startswith("no C++ compiler was found (c++); ")


def test_without_torch_nothing_is_built_and_the_note_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    found = run()
    assert found["given"]["ext_modules"] == []
    assert found["MISSING"] == "torch was missing where it was built; install torch first"


def test_without_nvcc_the_cpu_kernels_are_built(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, None)
    found = run()
    (extension,) = found["given"]["ext_modules"]
    assert "csrc/gae.cpp" in extension.sources and "csrc/gae.cu" not in extension.sources
    assert found["MISSING"] == "nvcc was not found; install the CUDA toolkit 12.8, or name its folder in CUDA_HOME"


def test_nvcc_of_another_cuda_than_torchs(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", "13.0")
    cuda(monkeypatch, home)
    found = run()
    assert "csrc/gae.cu" not in found["given"]["ext_modules"][0].sources
    assert found["MISSING"].startswith(f"{home}/bin/nvcc is of CUDA 13.0, torch of 12.8; install that CUDA toolkit")
    monkeypatch.setenv("RLHF_LIGHTNING_BUILD", "required")
    with pytest.raises(SystemExit, match=r"RLHF_LIGHTNING_BUILD=required, but .* is of CUDA 13.0, torch of 12.8"):
        run()


def test_nvcc_of_torchs_cuda(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda(monkeypatch, toolkit(tmp_path / "cuda", "12.4"))  # the minor versions may differ
    found = run()
    assert "csrc/gae.cu" in found["given"]["ext_modules"][0].sources
    assert found["MISSING"] == ""


def test_a_build_that_fails_leaves_its_reason(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("Error compiling\nobjects for extension")

    monkeypatch.setattr(cpp_extension.BuildExtension, "run", fail)
    found = run()
    command = found["given"]["cmdclass"]["build_ext"](setuptools.Distribution({"version": "1"}))
    command.extensions, command.inplace, command.build_lib = [], False, str(tmp_path)
    command.run()
    package = tmp_path / "rlhf_lightning"
    assert rebuild.note(package) == "the build failed (RuntimeError: Error compiling objects for extension)"
    found["leave_note"](str(tmp_path), "")  # what a build that goes well does
    assert rebuild.note(package) == ""
    assert found["NOTE"] == rebuild.NOTE
