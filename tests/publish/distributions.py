"""Makes the sdist and the wheel, and tries each in a new environment as a user would: `make dist`, `make test-dist`.

    python tests/publish/distributions.py [--out dist] [--try] [--python python3.11]

The wheel is built from the sdist, with the torch of the Python that this runs with. Trying means: an environment
outside this checkout with the versions of constraints.txt, the archive installed in it, `info` with native operators,
and two steps of SFT by the shipped config.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD_TOOLS = ("setuptools", "wheel", "pybind11", "ninja", "numpy")
TINY = """
import sys
from tiny_models import make_config, make_tokenizer
from transformers import LlamaForCausalLM
LlamaForCausalLM(make_config()).save_pretrained(sys.argv[1])
make_tokenizer("<pad>").save_pretrained(sys.argv[1])
"""


def call(command: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    """What the command prints; CalledProcessError with its output shown where it fails.

    It runs without this checkout on its path.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def make_sdist(out: Path, root: Path = ROOT) -> Path:
    """The sdist of ``root``, written to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call([sys.executable, "-c", code, out.resolve()], root, RLHF_LIGHTNING_BUILD="none")  # nothing to compile
    (sdist,) = out.glob("rlhf_lightning-*.tar.gz")
    return sdist


def unpack(sdist: Path, out: Path) -> Path:
    """The one folder in ``sdist``, unpacked into ``out``."""
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    return out / sdist.name.removesuffix(".tar.gz")


def make_wheel(sdist: Path, out: Path, build: str = "required") -> Path:
    """The wheel of ``sdist``, written to the folder ``out``; ``build`` is RLHF_LIGHTNING_BUILD."""
    out.mkdir(parents=True, exist_ok=True)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as temporary:
        source = unpack(sdist, Path(temporary))
        said = call([sys.executable, "-c", code, out.resolve()], source, RLHF_LIGHTNING_BUILD=build)
    return out / said.splitlines()[-1]


def new_environment(folder: Path, python: str, constraints: Path, packages: Sequence[str]) -> Path:
    """A virtual environment with ``packages`` in the versions of ``constraints``; returns its Python."""
    interpreter = folder / "bin" / "python"
    if not interpreter.exists():
        call([python, "-m", "venv", folder], ROOT)
    arguments = os.environ.get("TORCH_ARGS", "").split()
    install(interpreter, "-c", constraints, *arguments, "torch")  # first: nothing later may bring another build of it
    install(interpreter, "-c", constraints, *packages)
    return interpreter


def install(interpreter: Path, *arguments: str | Path) -> None:
    """pip install in the environment of ``interpreter``; what is there already is not fetched again."""
    call([interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], ROOT)


def try_archive(archive: Path, python: str) -> None:
    """Install ``archive`` in a new environment, ask it what it has, and train two steps."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        constraints = ROOT / "constraints.txt"
        interpreter = new_environment(folder / "venv", python, constraints, BUILD_TOOLS)
        build = ["--no-build-isolation", "--no-cache-dir"]
        install(interpreter, *build, "-c", constraints, archive.resolve())
        command = interpreter.parent / "rlhf-lightning"
        told: dict[str, Any] = json.loads(call([command, "info", "--json"], folder, RLHF_LIGHTNING_OPS="native"))
        paths = {name: devices["cpu"]["path"] for name, devices in told["operators"]["operators"].items()}
        assert set(paths.values()) == {"native"}, paths
        where = call([interpreter, "-c", "import rlhf_lightning; print(rlhf_lightning.__file__)"], folder)
        assert str(folder) in where, f"not the installed package: {where}"
        shutil.copy(ROOT / "tests" / "tiny_models.py", folder)
        call([interpreter, "-c", TINY, "tiny"], folder)
        rows = [{"prompt": f"the {word} cat", "completion": "is good"} for word in ("red", "big", "old", "small")]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fit = ["fit", "--config", "sft.yaml", "--model.model", "tiny", "--data.path", "rows.jsonl", "--run", "tried"]
        call([command, *fit, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"], folder)
        assert (folder / "runs" / "tried" / "model" / "model.safetensors").is_file()
    print(f"{archive.name}: installs, tells, trains")


def main() -> int:
    """Make both archives, and with ``--try`` try them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the archives go")
    parser.add_argument("--try", action="store_true", dest="tried", help="install each and train a little")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the new environments")
    options = parser.parse_args()
    for old in [*options.out.glob("rlhf_lightning-*.tar.gz"), *options.out.glob("rlhf_lightning-*.whl")]:
        old.unlink()
    sdist = make_sdist(options.out)
    wheel = make_wheel(sdist, options.out)
    print(f"{sdist}\n{wheel}")
    if options.tried:
        for archive in (wheel, sdist):
            try_archive(archive, options.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
