"""Runs the CUDA kernels of csrc/*.cu on the CPU: compiled as C++ against cuda_emulator/, called with guarded arrays.

What it finds: wrong results, missing and divergent barriers, accesses out of bounds or misaligned, shared memory that
was never written. What it cannot tell: speed, and the last bits of the GPU's own exp and log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path(__file__).resolve().parent / "cuda_emulator"
COMPILER = tuple(shlex.split(os.environ.get("CXX", "g++")))
# Traps for what a GPU would do quietly: an index outside a C array, a shift too far, a division by zero.
TRAPS = ["-fsanitize=bounds,shift,integer-divide-by-zero,alignment", "-fsanitize-undefined-trap-on-error"]
FLAGS = ["-std=gnu++17", "-O1", "-g0", "-shared", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", *TRAPS]
PAGE = mmap.PAGESIZE
FILL = 0xFF  # NaN in every float type, what stands between an array and its guard pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class LaunchError(RuntimeError):
    """A kernel did what it must not; the message says what, where, and by which thread."""


def guarded(tensor: Tensor, at_end: bool = True, offset: int = 0) -> Tensor:
    """A contiguous copy between two pages that cannot be touched.

    ``at_end``: the last byte stands before the upper page, whatever alignment that gives the first; else the first
    stands ``offset`` elements after the lower page. Nothing is promised about the memory between the array and the
    other page but that :func:`Emulated.run` sees it written.
    """
    size = tensor.numel() * tensor.element_size()
    room = -(-(size + offset * tensor.element_size()) // PAGE) * PAGE + PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + room):
        assert _libc.mprotect(page, PAGE, 0) == 0
    inside = torch.frombuffer(memory, dtype=torch.uint8, offset=PAGE, count=room)
    inside.fill_(FILL)
    first = room - size if at_end else offset * tensor.element_size()
    part = inside[first : first + size].view(tensor.dtype).view(tensor.shape)
    part.copy_(tensor)
    part.margins = (inside[:first], inside[first + size :])  # type: ignore[attr-defined]
    return part


class Emulated:
    """One .cu file as a shared object on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_message.restype = ctypes.c_char_p
        self._library.emulator_allow_array.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def device(self, multiprocessors: int = 132, capability_major: int = 9) -> None:
        """What the launchers are told about the GPU."""
        self._library.emulator_device(multiprocessors, capability_major)

    def run(self, launcher: str, *arguments: object, seed: int = 0) -> None:
        """Call an ``extern "C"`` launcher: tensors are passed as pointers, int as int64_t, float as double.

        The tensors, made by :func:`guarded`, are all the global memory that the kernels may touch. ``seed`` draws the
        order of threads and blocks.

        Raises:
            LaunchError: the launcher returned a CUDA error, or something was written beside an array.
        """
        library = self._library
        library.emulator_seed(ctypes.c_uint(seed))
        library.emulator_forget_arrays()
        values: list[object] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.is_contiguous() and hasattr(argument, "margins"), "use guarded()"
                library.emulator_allow_array(argument.data_ptr(), argument.numel() * argument.element_size())
                values.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, float):
                values.append(ctypes.c_double(argument))
            else:
                assert isinstance(argument, int), argument
                values.append(ctypes.c_int64(argument))
        code = getattr(library, launcher)(*values)
        if code != 0:
            raise LaunchError(f"{launcher}: error {code}: {library.emulator_message().decode()}")
        for argument in arguments:
            if isinstance(argument, Tensor):
                for margin in argument.margins:  # type: ignore[attr-defined]
                    if (margin != FILL).any():
                        raise LaunchError(f"{launcher}: a write beside an array of shape {list(argument.shape)}")


@functools.cache
def unfit(compiler: tuple[str, ...]) -> str | None:
    """Why the emulator cannot be compiled with it; None where it can."""
    named = " ".join(compiler)
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"the CUDA emulator needs g++: no C++ compiler {named}: {error.strerror}"
    if done.returncode != 0 or "#define __GNUC__ " not in done.stdout or "#define __clang__ " in done.stdout:
        return f"the CUDA emulator needs g++: {named} is not GCC's C++ compiler"
    return None


def emulate(source: str, exports: str = "", headers: tuple[Path, ...] = (ROOT / "csrc", HEADERS)) -> Emulated:
    """Compile CUDA code, and ``exports``, C++ code with the ``extern "C"`` functions that tests call, for the CPU.

    ``source`` is the name of a file in csrc/, or code. The shared object is kept in build/ for as long as nothing that
    it is made of changes. Without GCC the test is skipped; with CI set in the environment it fails.
    """
    if reason := unfit(COMPILER):
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; the kernels went unchecked")
        pytest.skip(reason)
    code = f'#include "{ROOT / "csrc" / source}"\n' if source.endswith(".cu") else source
    code = f'#include "cuda_runtime.h"\n{code}\n{exports}\n'
    files = [p for folder in headers for p in sorted(folder.iterdir()) if p.suffix in (".h", ".cuh", ".cu")]
    told = [*COMPILER, *FLAGS, code, *(p.read_text(encoding="utf-8") for p in files)]
    name = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_emulator"
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{name}.{os.getpid()}.so"
        command = [*COMPILER, *FLAGS, *(f"-I{h}" for h in reversed(headers)), "-x", "c++", "-", "-o", str(partial)]
        done = subprocess.run(command, input=code, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(partial, library)
    return Emulated(library)


def emulated(source: str, exports: str = "") -> Callable[[], Emulated]:
    """A fixture that gives the emulated file to the tests of a module; compiled when the first of them asks."""

    @pytest.fixture(scope="module")
    def fixture() -> Emulated:
        return emulate(source, exports)

    return fixture
