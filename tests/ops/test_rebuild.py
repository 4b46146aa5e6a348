"""The advice on how to build the operators fits how this copy was installed."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_lightning.ops import extension, rebuild

ROOT = Path(__file__).resolve().parents[2]


def installed(monkeypatch: pytest.MonkeyPatch, direct: dict | None) -> None:
    text = None if direct is None else json.dumps(direct)
    found = SimpleNamespace(version="0.1.0", read_text=lambda name: text if name == "direct_url.json" else None)
    monkeypatch.setattr(rebuild.metadata, "distribution", lambda name: found)


def test_a_checkout_is_built_in_place(tmp_path: Path) -> None:
    root = tmp_path / "my work"
    (root / "csrc").mkdir(parents=True)
    (root / "setup.py").touch()
    assert rebuild.command("X=1", root / "rlhf_lightning").endswith(
        f" && X=1 pip install -v --no-build-isolation -e '{root}'"
    )


@pytest.mark.parametrize(
    ("direct", "source"),
    [
        (None, "--no-binary rlhf-lightning rlhf-lightning==0.1.0"),
        (
            {"url": "file:///a%20b/rlhf_lightning-0.1.0.tar.gz", "archive_info": {}},
            "'/a b/rlhf_lightning-0.1.0.tar.gz'",
        ),
        ({"url": "file:///src/rlhf", "dir_info": {}}, "/src/rlhf"),
        ({"url": "file:///w/rlhf_lightning-0.1.0-py3-none-any.whl", "archive_info": {}}, "rlhf_lightning-0.1.0.tar.gz"),
        ({"url": "https://example.org/a.tar.gz", "archive_info": {}}, "https://example.org/a.tar.gz"),
    ],
    ids=["index", "sdist", "folder", "wheel", "address"],
)
def test_an_installed_copy_is_built_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direct: dict | None, source: str
) -> None:
    installed(monkeypatch, direct)
    command = rebuild.command(package=tmp_path / "site-packages" / "rlhf_lightning")
    options = "-v --no-build-isolation --no-deps --force-reinstall --no-cache-dir"
    assert command.endswith(f" && pip install {options} {source}")
    assert "make" not in shlex.split(command)


def test_the_tools_are_those_of_the_build() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    tools = shlex.split(rebuild.command().partition(" && ")[0])[2:]
    assert sorted(tools) == sorted(line for line in wanted if not line.startswith("torch"))


def test_the_note_of_the_build_is_one_line_or_nothing(tmp_path: Path) -> None:
    assert rebuild.note(tmp_path) == ""
    (tmp_path / rebuild.NOTE).write_text("no C++ compiler\nwas found\n", encoding="utf-8")
    assert rebuild.note(tmp_path) == "no C++ compiler was found"


@pytest.mark.parametrize("note", ["", "no C++ compiler was found (c++); install one"])
def test_a_missing_library_is_told_with_the_builds_own_reason(monkeypatch: pytest.MonkeyPatch, note: str) -> None:
    monkeypatch.setattr(rebuild, "note", lambda: note)
    monkeypatch.setattr(rebuild, "PACKAGE", Path("/nowhere"))
    why = note or "this copy came without it"
    assert extension._absent() == f"the extension is not built: {why}; build it: {rebuild.command()}"


def test_a_library_for_another_python_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(rebuild, "PACKAGE", tmp_path)
    assert "built for another Python (_C.cpython-39-x86_64-linux-gnu.so); build it: pip" in extension._absent()


GPU = {"cuda": True, "cuda_architectures": ["9.0"]}
CPU = {"cuda": False, "cuda_architectures": []}


@pytest.mark.parametrize(
    ("build", "kernel", "note", "said"),
    [
        (GPU, True, "", "this GPU, compute capability 8.6, is not among those of the build, 9.0; build it again"),
        (
            {**GPU, "cuda": False},
            False,
            "nvcc was not found",
            "this build has no CUDA kernels: nvcc was not found; build",
        ),
        (
            {**GPU, "cuda": False},
            False,
            "",
            "this build has no CUDA kernels: nvcc was not used; it is in the CUDA toolkit",
        ),
    ],
    ids=["other GPU", "no nvcc", "no note"],
)
def test_a_gpu_without_kernels_is_told(monkeypatch, build, kernel, note, said):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(extension, "LOADED", True)
    monkeypatch.setattr(extension, "_BUILD", build)
    monkeypatch.setitem(extension._NATIVE, ("gae", "cuda"), kernel)
    monkeypatch.setattr(extension.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension.torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(rebuild, "note", lambda: note)
    line = extension._no_kernel("gae", extension.torch.device("cuda"))
    assert line.startswith(said) and "TORCH_CUDA_ARCH_LIST=8.6 pip install" in line
