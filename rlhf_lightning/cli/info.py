"""``python -m rlhf_lightning info``: shows what is installed, and which operators run natively on this machine.

Attach its output to a bug report. It imports only torch and the extension, and reads the other versions from the
package metadata.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from rlhf_lightning import __version__
from rlhf_lightning.errors import CommandParser
from rlhf_lightning.ops import extension

_PACKAGES = ("lightning", "transformers", "jsonargparse", "safetensors", "torchmetrics", "tensorboard")


def main(arguments: Sequence[str]) -> int:
    """Prints what is installed here, with ``--json`` as JSON."""
    parser = CommandParser(prog="python -m rlhf_lightning info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    gathered = gather()
    print(json.dumps(gathered, indent=2) if options.json else _as_text(gathered))
    return 0


def gather() -> dict[str, Any]:
    """Everything that ``info`` shows, as plain values.

    Keys: ``rlhf_lightning``, ``python``, ``system``, ``cpu_threads``, ``cpu_bf16`` (this CPU's instructions for
    bfloat16 products, None if torch cannot tell), ``packages`` (name to version, None if not installed), ``cuda`` (the
    version that torch was built with, None for a CPU build), ``gpus`` (their names), and ``operators``, see
    ``ops.extension.status``.
    """
    return {
        "rlhf_lightning": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "cpu_bf16": _bf16_products(),
        "packages": {"torch": torch.__version__, **{name: _version(name) for name in _PACKAGES}},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "operators": extension.status(),
    }


def _bf16_products() -> list[str] | None:
    """The CPU's instructions for products of bfloat16. Without any, such products are slower than those of float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return None
    found = capabilities()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
    return [shown for name, shown in names.items() if found.get(name)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _as_text(gathered: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version or 'MISSING'}" for name, version in gathered["packages"].items())
    gpus = ", ".join(gathered["gpus"]) or "none"
    lines = [
        f"rlhf_lightning  {gathered['rlhf_lightning']}",
        f"python          {gathered['python']} on {gathered['system']}, {gathered['cpu_threads']} CPU threads",
        f"CPU bfloat16    {_bf16_line(gathered['cpu_bf16'])}",
        f"packages        {packages}",
        f"GPUs            {gpus} (torch is built with {'CUDA ' + gathered['cuda'] if gathered['cuda'] else 'no CUDA'})",
        *_operator_lines(gathered["operators"]),
    ]
    return "\n".join(lines)


def _bf16_line(products: list[str] | None) -> str:
    if products is None:
        return "not told by this version of torch"
    if not products:
        return "no products of its own: train with --trainer.precision 32-true"
    return f"products by {', '.join(products)}: --trainer.precision bf16-mixed uses them"


def _operator_lines(status: dict[str, Any]) -> list[str]:
    """One line for all operators that take the same path for the same reason."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for operator, devices in status["operators"].items():
        for device, path in devices.items():
            alike.setdefault((device, path["path"], path["why"]), []).append(operator)
    lines = [
        f"on {device:<12} {'native' if path == 'native' else 'plain PyTorch'}: {', '.join(operators)} ({why})"
        for (device, path, why), operators in alike.items()
    ]
    build, gpu = status["build"], status["gpu"]
    if build is not None:
        architectures = ", ".join(build["cuda_architectures"]) or "none"
        lines.append(f"built for       CPU, CUDA architectures: {architectures}")
    if gpu is not None:
        covered = "covered by this build" if gpu["covered"] else "not covered, see above"
        lines.append(f"this GPU        {gpu['name']}, compute capability {gpu['compute_capability']}: {covered}")
    return lines
