"""Builds the native operators, csrc/ -> rlhf_lightning/_C; everything else is declared in pyproject.toml.

RLHF_LIGHTNING_BUILD=auto      the default: build, and where that fails install without, saying so on stderr
RLHF_LIGHTNING_BUILD=required  a build that fails is an error
RLHF_LIGHTNING_BUILD=none      do not build: the operators' plain PyTorch references are used

The CUDA kernels are compiled too where torch is a CUDA build and nvcc is found, for the architectures that
TORCH_CUDA_ARCH_LIST names, for example "8.0;9.0+PTX"; where it is not set, for the GPUs of this machine, and on a
machine without any for DEFAULT_ARCHITECTURES. No GPU and no network is needed. What was left out, and why, is kept in
a file of the package, NOTE, for `info` to tell.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("RLHF_LIGHTNING_BUILD", "auto")
if MODE not in ("auto", "required", "none"):
    sys.exit(f"RLHF_LIGHTNING_BUILD must be auto, required or none, got {MODE}")

torch_build_ext = build_ext
if MODE != "none":
    with suppress(ImportError):  # an sdist can be made, and the package installed, all the same
        from torch.utils.cpp_extension import BuildExtension as torch_build_ext

NOTE = "_C.missing"  # beside the package's files; rlhf_lightning/ops/rebuild.py tells it to the user
# No fused multiply-add unless the source says so: GAE and the value loss are then the same bits on every machine, and
# the policy loss however its elements are split. No -march: the kernels choose their instruction set at run time.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-g0"]
# nvcc may fuse multiply-adds: where a rounding is promised, the kernels leave it nothing to fuse.
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # +PTX: what a driver can compile for any later GPU
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # what at::parallel_for is made of; the library is torch's own


def obstacle() -> str:
    """Why nothing can be compiled here, with what to do about it; empty where it can be tried."""
    if MODE == "none":
        return "RLHF_LIGHTNING_BUILD=none was set when it was installed; unset it"
    if torch_build_ext is build_ext:
        return "torch was missing where it was built; install torch first"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if sys.platform == "linux" and shutil.which(compiler) is None:
        return f"no C++ compiler was found ({compiler}); install one, such as g++, or name yours in CXX"
    return ""


def cuda_obstacle() -> str:
    """Why the CUDA kernels are left out although torch has CUDA; empty where they are compiled or torch has none."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = torch.version.cuda
    if wanted is None:
        return ""
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.is_file():
        return f"nvcc was not found; install the CUDA toolkit {wanted}, or name its folder in CUDA_HOME"
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or found[1] != wanted.partition(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "unknown"
        mismatch = f"{nvcc} is of CUDA {version}, torch of {wanted}; install that CUDA toolkit and name it in CUDA_HOME"
        if MODE == "required":
            sys.exit(f"RLHF_LIGHTNING_BUILD=required, but {mismatch}")
        return mismatch
    return ""


def leave_note(folder: str, text: str) -> None:
    """Keep ``text``, one line, with the package in ``folder``, since pip hides what a successful build prints."""
    note = Path(folder, "rlhf_lightning", NOTE)
    note.unlink(missing_ok=True)
    if text:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(text + "\n", encoding="utf-8")
        print(f"\nrlhf_lightning: the native operators are not complete: {text}\n", file=sys.stderr)


class BuildPython(build_py):
    """Leaves the note of what is known to be missing before anything is compiled."""

    def run(self) -> None:
        super().run()
        leave_note("." if self.editable_mode else self.build_lib, MISSING)


class Build(torch_build_ext):  # type: ignore[misc,valid-type]
    """Lets an install go on without the operators, and never overwrites a library that a running process has mapped."""

    def run(self) -> None:
        import torch

        for extension in self.extensions:
            extension.define_macros += [
                ("RLHF_LIGHTNING_VERSION", self.distribution.get_version()),
                ("RLHF_LIGHTNING_TORCH_VERSION", torch.__version__),
            ]
        try:
            super().run()
        except Exception as error:
            if MODE == "required":
                raise
            reason = " ".join(str(error).split())[:300]
            leave_note("." if self.inplace else self.build_lib, f"the build failed ({type(error).__name__}: {reason})")
            self.extensions.clear()  # nothing to copy or to install

    def build_extensions(self) -> None:
        named = self.compiler.object_filenames

        def object_filenames(sources, *args, **kwargs):  # type: ignore[no-untyped-def]
            objects = named(sources, *args, **kwargs)
            # gae.cpp and gae.cu may not both become gae.o.
            return [
                f"{name.removesuffix('.o')}_cu.o" if source.endswith(".cu") else name
                for source, name in zip(sources, objects, strict=True)
            ]

        self.compiler.object_filenames = object_filenames
        super().build_extensions()

    def copy_file(self, infile, outfile, *args, **kwargs):  # type: ignore[no-untyped-def]
        partial = f"{outfile}.partial"
        super().copy_file(infile, partial, *args, **kwargs)
        os.replace(partial, outfile)
        return outfile, True


def extensions() -> list:
    """The one extension, of the C++ sources, and of the CUDA sources where they can be compiled."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    with_cuda = torch.version.cuda is not None and not MISSING
    sources = {*glob("csrc/*.cpp"), *glob("csrc/*.cu")}
    macros = []
    if with_cuda:
        # Colons, since nvcc takes what follows a comma for another macro.
        macros.append(("RLHF_LIGHTNING_CUDA_ARCHITECTURES", ":".join(cuda_architectures())))
    else:
        sources -= {*glob("csrc/*.cu"), *glob("csrc/*_cuda.cpp")}
    kind = CUDAExtension if with_cuda else CppExtension
    return [
        kind(
            "rlhf_lightning._C",
            sources=sorted(sources),
            depends=sorted([*glob("csrc/*.h"), *glob("csrc/*.cuh")]),
            define_macros=macros,
            extra_compile_args={"cxx": CXX_FLAGS + OPENMP, "nvcc": NVCC_FLAGS},
            extra_link_args=OPENMP,
        )
    ]


def cuda_architectures() -> list[str]:
    """What torch is about to compile for, as TORCH_CUDA_ARCH_LIST has it, e.g. ``["8.0", "9.0a", "10.0+PTX"]``.

    Read off the very flags that torch hands to nvcc, since the variable may also say "Hopper" or "native".
    """
    import torch
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    with_ptx = {f"{major}.{minor}" for major, minor in re.findall(r"code=compute_(\d+)(\d\w?)\b", flags)}
    found = [f"{major}.{minor}" for major, minor in re.findall(r"code=sm_(\d+)(\d\w?)\b", flags)]
    found.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return [name + ("+PTX" if name in with_ptx else "") for name in found]


if obstacle() and MODE == "required":
    sys.exit(f"RLHF_LIGHTNING_BUILD=required, but {obstacle()}")
MISSING = obstacle() or cuda_obstacle()

setup(
    packages=[*find_packages(include=["rlhf_lightning", "rlhf_lightning.*"]), "rlhf_lightning.configs"],
    ext_modules=[] if obstacle() else extensions(),
    cmdclass={"build_py": BuildPython, "build_ext": Build},
)
