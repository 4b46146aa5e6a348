"""Which path is taken, and what is said about it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops.support import needs_native

from rlhf_lightning import ops
from rlhf_lightning.ops import extension, rebuild

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


USE = """
import torch
from rlhf_lightning.ops import extension, gae
x = torch.ones(1, 2)
print(gae(x, x, x.bool(), 1.0, 1.0)[0].tolist(), extension.status()["operators"]["gae"]["cpu"]["path"])
gae(x, x, x.bool(), 1.0, 1.0)
"""
WITHOUT = "import sys\nsys.modules['rlhf_lightning._C'] = None\n"


@needs_native
def test_native_by_default_and_silent():
    result = python(USE, RLHF_LIGHTNING_OPS="auto")
    assert result.stdout == "[[1.0, 0.0]] native\n" and "rlhf_lightning" not in result.stderr


def test_the_reference_on_request_is_silent():
    result = python(USE, RLHF_LIGHTNING_OPS="reference")
    assert result.stdout == "[[1.0, 0.0]] reference\n" and "rlhf_lightning" not in result.stderr


def test_without_the_extension_the_reference_is_taken_and_that_is_said_once():
    result = python(WITHOUT + USE, RLHF_LIGHTNING_OPS="auto")
    assert result.stdout == "[[1.0, 0.0]] reference\n"
    assert result.stderr.count("using the slower plain PyTorch operators: the extension is not built") == 1


def test_native_makes_absence_an_error():
    result = python(WITHOUT + USE, RLHF_LIGHTNING_OPS="native")
    assert result.returncode == 1
    assert "ImportError: RLHF_LIGHTNING_OPS=native, but the extension is not built" in result.stderr


def test_an_unknown_choice_names_the_choices(monkeypatch):
    monkeypatch.setenv("RLHF_LIGHTNING_OPS", "fast")
    with pytest.raises(ValueError, match="RLHF_LIGHTNING_OPS must be one of auto, native, reference, got fast"):
        extension._choice()


def test_a_build_for_another_torch_is_refused(monkeypatch):
    other = SimpleNamespace(build_info=lambda: {"torch": "1.2.3"})
    monkeypatch.setattr(extension.importlib, "import_module", lambda name: other)
    build, reason = extension._load()
    assert build is None
    said = f"the extension was built for torch 1.2.3, this is {torch.__version__}; install torch 1.2.3, or"
    assert reason == f"{said} build it again: {rebuild.command()}"


@needs_native
def test_a_build_of_older_sources_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "OPERATORS", (*extension.OPERATORS, "of_tomorrow"))
    build, reason = extension._load()
    assert build is None
    said = "the extension was built from older sources, without of_tomorrow; build it again: "
    assert reason == said + rebuild.command()


def test_a_library_that_cannot_be_loaded_is_told_in_one_line(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: _ZN2at\nmore")

    monkeypatch.setattr(extension.importlib, "import_module", fail)
    build, reason = extension._load()
    assert build is None and "\n" not in reason
    assert reason.endswith(f" (undefined symbol: _ZN2at); build it again: {rebuild.command()}")


def schemas() -> list[str]:
    """The names of the schemas in csrc/registration.cpp, those of backwards left out."""
    source = (CSRC / "registration.cpp").read_text(encoding="utf-8")
    return [name for name in re.findall(r'm\.def\(\s*"(\w+)\(', source) if not name.endswith("_backward")]


def test_an_operator_is_a_file_an_export_a_schema_and_a_row_of_the_document():
    assert list(extension.OPERATORS) == sorted(ops.__all__) == sorted(schemas())
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "operators.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows[: len(extension.OPERATORS)]) == list(extension.OPERATORS)


def test_contributing_names_every_place_of_an_operator():
    """Of gae, which has all of them: each file of the operators' code that names it outside of comments."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## A new operator")[2].partition("\n## ")[0]
    listed = {ROOT / name for name in re.findall(r"`((?:csrc|rlhf_lightning)/\S+)`", section)}
    files = [*CSRC.iterdir(), *(ROOT / "rlhf_lightning" / "ops").glob("*.py")]
    code = {path: re.sub(r"(//|#).*", "", path.read_text(encoding="utf-8")) for path in files}
    assert {path for path in files if re.search("gae", code[path], re.IGNORECASE)} == listed


def test_status_covers_every_operator():
    status = extension.status()
    assert set(status["operators"]) == set(extension.OPERATORS)
    for paths in status["operators"].values():
        assert paths["cpu"]["path"] == ("native" if extension.LOADED else "reference") and paths["cpu"]["why"]
    assert status["build"] == extension.build_info()


@needs_native
def test_build_info():
    info = extension.build_info()
    assert info["torch"] == torch.__version__
    assert info["cpu_instruction_set_in_use"] in info["cpu_instruction_sets"]
    assert isinstance(info["cuda"], bool) and isinstance(info["cuda_architectures"], list)


@needs_native
def test_a_device_without_kernels_takes_the_reference():
    assert not extension.use_native("gae", torch.device("meta"))


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ([], (9, 0), False),
        (["8.0", "9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),  # machine code runs on later minor versions
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),  # the driver compiles the intermediate form
        (["9.0+PTX"], (8, 0), False),
        (["10.0"], (9, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 2), False),
        (["8.0", "10.0a+PTX"], (12, 0), False),
    ],
)
def test_which_gpus_a_build_covers(architectures, capability, covered):
    assert extension.covers(architectures, capability) is covered


def test_operators_import_neither_lightning_nor_transformers():
    code = (
        "import sys, rlhf_lightning.ops; print({'lightning', 'transformers', 'pytorch_lightning'} & set(sys.modules))"
    )
    assert python(code).stdout == "set()\n"
