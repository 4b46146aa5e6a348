"""The house rules that a machine can hold: layers, light imports, sizes, safe loading, docstrings."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlhf_lightning"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in SOURCES]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))

# Imports point down: a unit may import what stands on an earlier line, or beside it.
LAYERS = (
    ("errors", "text", "outputs", "options", "collectives", "batches", "randomness", "ops"),
    ("algorithms",),
    ("models", "data"),
    ("rewards", "rollout"),
    ("preferences",),
    ("evaluation", "training"),
    ("modules", "callbacks", "distributed"),
    ("demo", "cli"),
    ("__main__",),
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
MAX_LINES = 400
MAX_FUNCTION_LINES = 90


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """The dotted names of every module imported anywhere in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""
            if node.module == "rlhf_lightning":
                yield from (f"rlhf_lightning.{alias.name}" for alias in node.names)


def unit_of(path: Path) -> str:
    """The package or module directly under rlhf_lightning that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    names = (name.split(".") for name in imports_of(path) if name.startswith("rlhf_lightning."))
    return {parts[1] for parts in names if parts[1] in LAYER}


def test_every_unit_has_a_layer() -> None:
    assert {unit_of(path) for path in SOURCES} - {"__init__"} == set(LAYER)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        assert not list(imports_of(path)), "importing the package must import nothing"
        return
    above = {name for name in own_imports(path) if LAYER[name] > LAYER[unit]}
    assert not above, f"{path.name} imports {above}, which stand above {unit}"


def test_units_beside_each_other_do_not_import_in_circles() -> None:
    edges: dict[str, set[str]] = {unit: set() for unit in LAYER}
    for path in SOURCES:
        if unit_of(path) in edges:
            edges[unit_of(path)] |= own_imports(path) - {unit_of(path)}
    finished: list[str] = []
    while len(finished) < len(edges):
        ready = [unit for unit in edges if unit not in finished and edges[unit] <= set(finished)]
        assert ready, f"a circle among {sorted(set(edges) - set(finished))}"
        finished += ready


def test_modules_and_data_meet_in_batches_only() -> None:
    for path in (PACKAGE / "modules").rglob("*.py"):
        assert "data" not in own_imports(path), path
    for path in (PACKAGE / "data").rglob("*.py"):
        assert "modules" not in own_imports(path), path


@pytest.mark.parametrize("unit", ["ops", "algorithms"])
def test_ops_and_algorithms_import_torch_alone(unit: str) -> None:
    for path in (PACKAGE / unit).rglob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in ("torch", "rlhf_lightning") or top in sys.stdlib_module_names, f"{path}: {name}"


def test_package_inits_only_re_export() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        for node in tree_of(path).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            name = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("__all__", "__version__")
            assert text or name or isinstance(node, (ast.Import, ast.ImportFrom)), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_docstrings(path: Path) -> None:
    tree = tree_of(path)
    assert tree.body == [] or ast.get_docstring(tree), f"{path}: what is this file for?"
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, definitions) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_files_are_short() -> None:
    files = [*SOURCES, *BENCHMARKS, *(ROOT / "csrc").iterdir()]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("path", [*SOURCES, *BENCHMARKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Places that could run what a data file, a checkpoint or a model folder says."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"):
                    yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if function in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield node.lineno, function
        if function == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        for name, value in (("weights_only", "False"), ("shell", "True"), ("trust_remote_code", "True")):
            if keywords.get(name) == value:
                yield node.lineno, f"{name}={value}"


def test_nothing_is_loaded_in_a_way_that_can_run_it() -> None:
    files = [*SOURCES, ROOT / "setup.py", *(ROOT / "examples").rglob("*.py"), *BENCHMARKS]
    found = [f"{path.relative_to(ROOT)}: {what}" for path in files for line, what in unsafe(tree_of(path))]
    # A pickle is read in one place, by an unpickler that finds a few named classes only (test_checkpoint_files.py).
    assert found == ["rlhf_lightning/distributed.py: import pickle"]


def test_the_check_for_unsafe_loads_sees_them() -> None:
    code = "import pickle\ntorch.load(f)\ntorch.load(f, weights_only=False)\neval(x)\nrun(c, shell=True)\nmodel.eval()"
    assert [line for line, _ in unsafe(ast.parse(code))] == [1, 2, 3, 3, 4, 5]


def test_remote_code_is_off_unless_asked_for() -> None:
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            positional = positional[len(positional) - len(arguments.defaults) :]
            pairs = [*zip(positional, arguments.defaults, strict=True)]
            pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
            for argument, default in pairs:
                if argument.arg == "trust_remote_code":
                    assert ast.unparse(default) == "False", f"{path}:{node.lineno}"


def test_extras_that_messages_name_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = {name for path in SOURCES for name in re.findall(r"rlhf-lightning\[(\w+)\]", path.read_text("utf-8"))}
    assert named >= {"hub", "parquet"}
    assert {name for name in named if not re.search(rf"^{name} = \[", project, re.MULTILINE)} == set()


# Start-up

HEAVY = ("lightning", "pytorch_lightning", "transformers", "jsonargparse", "tensorboard", "torchmetrics")


def run_python(code: str) -> tuple[str, float]:
    """What the code prints, and its processor seconds: other work on the machine changes those little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


CALL = "import sys\nfrom rlhf_lightning.cli import main\nassert main([{}]) == 0\n"


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import sys, rlhf_lightning\n", (*HEAVY, "torch")),
        (CALL.format("'--help'"), (*HEAVY, "torch")),
        (CALL.format("'--version'"), (*HEAVY, "torch")),
        (CALL.format("'info'"), HEAVY),
    ],
    ids=["import", "--help", "--version", "info"],
)
def test_light_commands_import_nothing_heavy(code: str, forbidden: tuple[str, ...]) -> None:
    output, _ = run_python(code + f"print('HEAVY', [m for m in {forbidden!r} if m in sys.modules])")
    assert output.splitlines()[-1] == "HEAVY []"


def test_info_answers_within_a_second_beyond_torch() -> None:
    """By the best of up to three tries."""
    tries = (run_python(CALL.format("'info'"))[1] - run_python("import torch")[1] for _ in range(3))
    assert any(extra < 1.0 for extra in tries)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and refuses to collect the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_no_two_files_of_the_package_have_one_name() -> None:
    """A name says what is in a file; ``base.py`` says it beside its folder's."""
    spared = {"__init__.py", "base.py"}
    names = [path.name for path in SOURCES if path.name not in spared]
    assert {name for name in names if names.count(name) > 1} == set()
