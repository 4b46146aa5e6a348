"""Tells how this copy of the package was built, and the command that builds its operators again.

A checkout, an unpacked folder, an sdist and a wheel each need another command. pip records which of them it was in the
package's metadata (PEP 610). If a build has no library or no CUDA kernels, setup.py writes the reason into a file in
the package's folder.
"""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

PACKAGE = Path(__file__).resolve().parent.parent
NOTE = "_C.missing"  # setup.py writes it; ignored by git and left out of the sdist
_DISTRIBUTION = "rlhf-lightning"
_TOOLS = "pip install 'setuptools>=77.0.3' 'pybind11>=3.0' 'ninja>=1.11.1' && "  # [build-system] but torch


def note(package: Path = PACKAGE) -> str:
    """Why setup.py built no library, or one without CUDA kernels, in one line; empty if it gave no reason."""
    try:
        return " ".join((package / NOTE).read_text(encoding="utf-8").split())
    except OSError:
        return ""


def command(variables: str = "", package: Path = PACKAGE) -> str:
    """The shell command that builds the operators for the installed torch, in place of those in ``package``.

    Args:
        variables: environment variables for the build, for example ``TORCH_CUDA_ARCH_LIST=9.0``.
        package: the folder ``rlhf_lightning`` that was imported.
    """
    prefix = f"{variables} " if variables else ""
    root = package.parent
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return f"{_TOOLS}{prefix}pip install -v --no-build-isolation -e {shlex.quote(str(root))}"
    # pip's cache may hold the wheel without operators, or with those for another torch, so it is not used.
    options = "-v --no-build-isolation --no-deps --force-reinstall --no-cache-dir"
    return f"{_TOOLS}{prefix}pip install {options} {_source()}"


def _source() -> str:
    """The argument for pip: the folder or sdist that this copy came from, or for a wheel the sdist of its version."""
    try:
        installed = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "the sdist"
    direct = installed.read_text("direct_url.json")
    if direct is None:  # from a package index, by name
        return f"--no-binary {_DISTRIBUTION} {_DISTRIBUTION}=={installed.version}"
    url = str(json.loads(direct)["url"])
    if url.endswith(".whl"):
        return f"rlhf_lightning-{installed.version}.tar.gz"
    parts = urlparse(url)
    return shlex.quote(unquote(parts.path) if parts.scheme == "file" else url)
