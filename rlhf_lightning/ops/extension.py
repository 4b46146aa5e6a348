"""Loads the compiled operators, decides once which path each operator takes, and reports it.

``RLHF_LIGHTNING_OPS`` chooses: ``auto`` (the default) takes the native operator wherever there is one, ``native`` makes
its absence an error, ``reference`` takes plain PyTorch everywhere. It is read once, when this file is imported.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pkgutil
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

import torch

from rlhf_lightning.ops import rebuild

# Every operator has one file in this folder; these files hold none.
_OTHER_FILES = ("checks", "extension", "rebuild")
OPERATORS = tuple(
    sorted(file.name for file in pkgutil.iter_modules([str(rebuild.PACKAGE / "ops")]) if file.name not in _OTHER_FILES)
)
VARIABLE = "RLHF_LIGHTNING_OPS"
_CHOICES = ("auto", "native", "reference")
_log = logging.getLogger("rlhf_lightning")


def _load() -> tuple[dict[str, Any] | None, str]:
    """``build_info()`` of the library, and why it is used; or None, why it is not used, and what to do."""
    try:
        info: dict[str, Any] = importlib.import_module("rlhf_lightning._C").build_info()
    except ModuleNotFoundError:
        return None, _absent()
    except ImportError as error:
        first_line = str(error).partition("\n")[0]
        return None, f"the extension cannot be loaded with torch {torch.__version__} ({first_line}); {_again()}"
    if info["torch"] != torch.__version__:
        torches = f"the extension was built for torch {info['torch']}, this is {torch.__version__}"
        return None, f"{torches}; install torch {info['torch']}, or {_again()}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.rlhf_lightning, name)]
    if missing:
        return None, f"the extension was built from older sources, without {', '.join(missing)}; {_again()}"
    return info, f"built for torch {info['torch']}"


def _again(variables: str = "") -> str:
    return f"build it again: {rebuild.command(variables)}"


def _absent() -> str:
    others = sorted(path.name for path in rebuild.PACKAGE.glob("_C.*.so") if path.name != f"_C{EXTENSION_SUFFIXES[0]}")
    if others:
        why = f"it was built for another Python ({', '.join(others)})"
    else:
        why = rebuild.note() or "this copy came without it"
    return f"the extension is not built: {why}; build it: {rebuild.command()}"


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(_CHOICES)}, got {choice}")
    return choice


CHOICE = _choice()
_BUILD, _REASON = _load()
LOADED = _BUILD is not None  # then torch.ops.rlhf_lightning has the operators
if not LOADED and CHOICE == "native":
    raise ImportError(f"{VARIABLE}=native, but {_REASON}")
if not LOADED and CHOICE == "auto":
    _log.warning("rlhf_lightning: using the slower plain PyTorch operators: %s", _REASON)


def _has_kernel(operator: str, device_type: str) -> bool:
    return LOADED and torch._C._dispatch_has_kernel_for_dispatch_key(f"rlhf_lightning::{operator}", device_type.upper())


# Decided here once, so that a call is only a look-up, which torch.compile can trace.
_NATIVE = {(operator, device): _has_kernel(operator, device) for operator in OPERATORS for device in ("cpu", "cuda")}
_warned: set[str] = set()


def keep_memory(on: bool) -> None:
    """Keeps the memory of large CPU tensors for later tensors of the same size; or stops this and frees that memory.

    On Linux, new memory costs a page fault for every page, and the system fills it with zeros, again in each step of a
    training. At most as much is kept as was in use at once, or 256 MiB. Without the extension this does nothing.
    """
    if LOADED:
        library = importlib.import_module("rlhf_lightning._C")
        library.keep_memory(on)
        if not on:
            library.release_kept_memory()


@functools.cache
def _covered(index: int | None) -> bool:
    # Asked only for the first tensor on a GPU, since importing this file must not start CUDA.
    return covers((_BUILD or {})["cuda_architectures"], torch.cuda.get_device_capability(index))


def _gpu_covered(index: int | None) -> bool:
    return _covered(index)


# torch.compiler.assume_constant_result does the same, but calling it would import the whole compiler with this file.
_gpu_covered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _runs(operator: str, device: torch.device) -> bool:
    if not _NATIVE.get((operator, device.type), False):
        return False
    return device.type != "cuda" or _gpu_covered(device.index)


def use_native(operator: str, device: torch.device) -> bool:
    """Whether ``operator`` runs natively on tensors of ``device``. If not, warns once for each kind of device."""
    if CHOICE == "reference":
        return False
    if _runs(operator, device):
        return True
    if CHOICE == "native":
        raise RuntimeError(f"{VARIABLE}=native, but {_no_kernel(operator, device)}")
    if LOADED and not torch.compiler.is_compiling() and device.type not in _warned:
        _warned.add(device.type)
        _log.warning("rlhf_lightning: using the slower plain PyTorch operators: %s", _no_kernel(operator, device))
    return False


def _no_kernel(operator: str, device: torch.device) -> str:
    """Why the library does not run ``operator`` on ``device``, and the remedy if there is one."""
    if not LOADED:
        return _REASON
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"{operator} has no native kernel for {device.type} tensors in this build"
    build = _BUILD or {}
    number = ".".join(map(str, torch.cuda.get_device_capability(device)))
    again = _again(f"TORCH_CUDA_ARCH_LIST={number}")
    if not build["cuda"]:
        why = rebuild.note() or f"nvcc was not used; it is in the CUDA toolkit {torch.version.cuda}"
        return f"this build has no CUDA kernels: {why}; {again}"
    if _NATIVE.get((operator, "cuda"), False):
        built = ", ".join(build["cuda_architectures"])
        return f"this GPU, compute capability {number}, is not among those of the build, {built}; {again}"
    return f"{operator} has no native kernel for cuda tensors in this build; {again}"


def build_info() -> dict[str, Any] | None:
    """What the loaded library was built with and for; None if no library is loaded."""
    return _BUILD


def status() -> dict[str, Any]:
    """For ``info``: the choice, each operator's path and why, the build, and whether this machine's GPU is covered.

    Keys: ``choice``; ``operators`` ``{name: {device type: {"path": "native" | "reference", "why": str}}}`` for the CPU,
    and for CUDA if there is a GPU; ``build``, see :func:`build_info`; ``gpu``, None without a GPU, else ``{"name",
    "compute_capability", "covered"}``, where covered means that the build has CUDA kernels that this GPU can run.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    operators = {name: {device: _path(name, device) for device in devices} for name in OPERATORS}
    return {"choice": CHOICE, "operators": operators, "build": _BUILD, "gpu": _gpu() if len(devices) == 2 else None}


def _path(operator: str, device_type: str) -> dict[str, str]:
    if CHOICE == "reference":
        return {"path": "reference", "why": f"{VARIABLE}=reference"}
    if _runs(operator, torch.device(device_type)):
        return {"path": "native", "why": _REASON}
    return {"path": "reference", "why": _no_kernel(operator, torch.device(device_type))}


def _gpu() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    architectures = _BUILD["cuda_architectures"] if _BUILD is not None else []
    return {
        "name": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "covered": covers(architectures, (major, minor)),
    }


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, as in ``TORCH_CUDA_ARCH_LIST``, runs on a GPU of this compute capability.

    Machine code runs on GPUs of its major version, from its minor version up. ``+PTX`` adds an intermediate form that
    the driver compiles for any later GPU. Code for the features of one GPU, e.g. ``9.0a``, runs only on that GPU.
    """
    for architecture in architectures:
        number, _, form = architecture.partition("+")
        major, _, minor = number.partition(".")
        if not minor.isdecimal():
            if (int(major), int(minor[:-1])) == capability:
                return True
            continue
        built = (int(major), int(minor))
        if (built[0] == capability[0] and built <= capability) or (form == "PTX" and built <= capability):
            return True
    return False
