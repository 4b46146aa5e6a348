"""pyproject.toml, constraints.txt and what the two archives hold: the truth that a package index and pip go by."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import lowest
import pytest
from distributions import ROOT, make_sdist, make_wheel
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlhf_lightning import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["project"]["optional-dependencies"].items()
}
IMPORTED_AS = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "markdown_it": "markdown-it-py",
}  # where the two names differ
GIVEN_BY = {"triton": "torch"}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_there_is_one_version() -> None:
    assert PROJECT["project"]["version"] == __version__


def test_every_requirement_has_one_lower_bound_that_can_be_tried() -> None:
    tried = lowest.lowest()
    assert {"torch==2.10", "jsonargparse[signatures]==4.51"} <= set(tried)
    assert {requirement.name for lines in EXTRAS.values() for requirement in lines} - {"rlhf-lightning"} <= {
        re.split(r"\[|==", pin)[0] for pin in tried
    }


@pytest.mark.parametrize(("line", "said"), [("rich", "no lower bound"), ("torch>=2.11", "elsewhere torch==2.10")])
def test_a_requirement_that_cannot_be_tried_is_refused(tmp_path: Path, line: str, said: str) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text.replace('hub = ["', f'hub = ["{line}", "'), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        lowest.lowest(tmp_path / "pyproject.toml")


def test_the_constraints_are_within_the_bounds() -> None:
    wrong = []
    for requirement in [*CORE, *(line for lines in EXTRAS.values() for line in lines)]:
        pin = pins().get(requirement.name.lower())
        if pin is not None and pin not in requirement.specifier:
            wrong.append(f"{requirement}, but constraints.txt has {pin}")
    assert not wrong
    installed = [*CORE, *EXTRAS["dev"]]
    assert {line.name.lower() for line in installed} - {"rlhf-lightning"} <= set(pins())


def test_one_python_is_the_floor() -> None:
    floor = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{floor.replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == floor
    minors = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert minors and all(minor in SpecifierSet(f">={floor}") for minor in minors)
    assert floor in minors


# What is imported, and what is said where it is missing


def third_party(tree: ast.AST) -> set[str]:
    """The distributions that the imports in ``tree`` come from."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    found = names - {"rlhf_lightning"} - set(sys.stdlib_module_names)
    return {GIVEN_BY.get(name, IMPORTED_AS.get(name, name)) for name in found}


def guarded(tree: ast.AST) -> dict[str, str]:
    """Each import inside ``try: ... except ImportError``, with the source of what is done then."""
    said = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                if handler.type is not None and "ImportError" in ast.unparse(handler.type):
                    names = third_party(ast.Module([*node.body], []))
                    said |= dict.fromkeys(names, ast.unparse(handler))
    return said


@pytest.mark.parametrize("path", sorted((ROOT / "rlhf_lightning").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_are_declared_and_what_is_missing_is_told_with_its_extra(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    optional = third_party(tree) - {requirement.name for requirement in CORE}
    for name in optional:
        extras = [extra for extra, lines in EXTRAS.items() if name in {line.name for line in lines}]
        assert extras, f"{path} imports {name}, which pyproject.toml does not name"
        message = guarded(tree).get(name, "")
        wanted = re.findall(r"pip install 'rlhf-lightning\[(\w+)\]'", message)
        assert wanted and wanted[0] in extras and wanted[0] != "dev", f"{path}: {name} missing gives {message!r}"


def test_extras_that_are_named_exist() -> None:
    places = ["rlhf_lightning", "examples", "configs", "docs", "benchmarks", "README.md", "CONTRIBUTING.md", "Makefile"]
    files = [path for place in places for path in ((ROOT / place).rglob("*.*") if "." not in place else [ROOT / place])]
    named = {}
    for path in files:
        if path.suffix in (".py", ".yaml", ".md"):
            for name, extra in re.findall(r"(rlhf[-_]lightning)\[([\w,]+)\]", path.read_text(encoding="utf-8")):
                assert name == "rlhf-lightning", path
                named |= dict.fromkeys(extra.split(","), path)
    assert {"hub", "parquet", "lora", "smollm2"} <= set(named) <= set(EXTRAS), named


# The archives


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(make_wheel(sdist, tmp_path_factory.mktemp("wheel"), build="none"))


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode("utf-8"))


def test_the_sdist_has_every_file_of_the_project(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "SECURITY.md", "rlhf_lightning/py.typed", "csrc/registration.cpp", "configs/sft.yaml"} <= held
    assert {"docs/ppo.md", "examples/own_engine.py", "tests/publish/lowest.py", ".ci/run"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc", ".missing")) or name.startswith("runs/")]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:  # else these tests run from an sdist
        assert {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} - held <= {".gitignore"}


def test_the_wheel_has_what_the_package_reads_and_no_more(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_lightning").rglob("*.py")}
    configs = {f"rlhf_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert sources | configs | {"rlhf_lightning/py.typed"} <= held
    assert {name.split("/")[0] for name in held} == {"rlhf_lightning", f"rlhf_lightning-{__version__}.dist-info"}
    assert f"rlhf_lightning-{__version__}.dist-info/licenses/LICENSE" in held


def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Requires-Python"] == PROJECT["project"]["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert not metadata.get_all("Project-URL"), "no address is known; when there is one, check it here"
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)


def test_a_wheel_without_operators_fits_any_machine_and_says_why(wheel: zipfile.ZipFile) -> None:
    assert str(wheel.filename).endswith("-py3-none-any.whl")
    assert b"RLHF_LIGHTNING_BUILD=none was set" in wheel.read("rlhf_lightning/_C.missing")
