"""The lowest versions that pyproject.toml allows, and the tests run with them: `make test-lowest`.

    python tests/publish/lowest.py            print them, one requirement a line, for pip
    python tests/publish/lowest.py --test     install them in .venv-lowest, build there, and run TESTS

The tests run from an unpacked sdist, so the library that was built in this checkout stays as it is. What is no direct
dependency comes in its newest version. TORCH_ARGS is handed to pip when it installs torch, as in the Makefile. Needs
the package registry and half an hour; `.ci/run` does not run it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from distributions import ROOT, call, install, make_sdist, new_environment, unpack

REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(?P<extras>\[[\w,-]+\])?>=(?P<lowest>[\w.]+)(?:,<[\w.]+)?")
# What touches a dependency: its options, its files, its models, its Trainer. Not the kernels' numerics.
TESTS = """
    tests/callbacks tests/data tests/evaluation tests/models tests/preferences tests/rewards tests/rollout
    tests/modules/test_sft.py tests/modules/test_reward_model.py tests/modules/test_dpo.py tests/modules/test_resume.py
    tests/modules/test_ppo_options.py tests/modules/test_lora_training.py tests/ops/test_extension.py
    tests/ops/test_gae.py tests/ops/test_token_log_probs.py tests/ops/test_sample_tokens.py tests/test_cli.py
    tests/cli/test_cli_training.py tests/cli/test_cli_refusals.py tests/test_configs.py tests/test_examples.py
    tests/publish/test_metadata.py
"""


def requirements(project: Path = ROOT / "pyproject.toml") -> Iterator[str]:
    """Every requirement of the package, of its extras and of its build, but those on its own extras."""
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    yield from content["build-system"]["requires"]
    yield from content["project"]["dependencies"]
    for extra in content["project"]["optional-dependencies"].values():
        yield from (line for line in extra if not line.startswith(f"{content['project']['name']}["))


def lowest(project: Path = ROOT / "pyproject.toml") -> list[str]:
    """``name[extras]==version`` for each; ValueError where one has no lower bound, or two different ones."""
    found: dict[str, str] = {}
    for line in requirements(project):
        match = REQUIREMENT.fullmatch(line)
        if match is None:
            raise ValueError(f"{project}: {line!r} has no lower bound of the form name>=version")
        pin = f"{match['name']}{match['extras'] or ''}=={match['lowest']}"
        if found.setdefault(match["name"], pin) != pin:
            raise ValueError(f"{project}: {line!r}, but elsewhere {found[match['name']]}")
    return list(found.values())


def test_with_them(python: str, chosen: list[str]) -> int:
    """Install, build and run ``chosen``; returns pytest's exit code."""
    pins = lowest()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        constraints = folder / "lowest.txt"
        constraints.write_text(re.sub(r"\[.*\]", "", "\n".join(pins)) + "\n", encoding="utf-8")
        # torch has its own turn; ruff and mypy judge the source, not what it runs with.
        packages = [pin for pin in pins if pin.split("==")[0] not in ("torch", "ruff", "mypy")]
        interpreter = new_environment(ROOT / ".venv-lowest", python, constraints, [*packages, "wheel"])
        source = unpack(make_sdist(folder), folder)
        install(interpreter, "--no-build-isolation", "--no-deps", "-e", source)
        print(call([interpreter, "-m", "pip", "list"], folder))
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        tests = [*chosen, "-q", "-p", "no:cacheprovider", "-m", "not slow"]
        return subprocess.run([interpreter, "-m", "pytest", *tests], cwd=source, env=variables, check=False).returncode


def main() -> int:
    """Print the versions, or test with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="install them and run the tests")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the new environment")
    parser.add_argument("tests", nargs="*", default=TESTS.split(), help="these tests in place of the usual ones")
    options = parser.parse_args()
    if not options.test:
        print("\n".join(lowest()))
        return 0
    return test_with_them(options.python, options.tests)


if __name__ == "__main__":
    sys.exit(main())
