"""Builds the native operators, csrc/ -> rlhf_lightning/_C; everything else is declared in pyproject.toml.

RLHF_LIGHTNING_BUILD=auto      the default: build, and where that fails install without, saying so on stderr
RLHF_LIGHTNING_BUILD=required  a build that fails is an error
RLHF_LIGHTNING_BUILD=none      do not build: the operators' plain PyTorch references are used

The CUDA kernels are compiled too where torch is a CUDA build and nvcc is found, for the architectures that
TORCH_CUDA_ARCH_LIST names, for example "8.0;9.0+PTX"; where it is not set, for the GPUs of this machine, and on a
machine without any for DEFAULT_ARCHITECTURES. No GPU and no network is needed.
"""

import os
import re
import sys
from glob import glob

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

MODE = os.environ.get("RLHF_LIGHTNING_BUILD", "auto")
if MODE not in ("auto", "required", "none"):
    sys.exit(f"RLHF_LIGHTNING_BUILD must be auto, required or none, got {MODE}")

# No fused multiply-add unless the source says so: GAE and the value loss are then the same bits on every machine, and
# the policy loss however its elements are split. No -march: the kernels choose their instruction set at run time.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-g0"]
# nvcc may fuse multiply-adds: where a rounding is promised, the kernels leave it nothing to fuse.
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # +PTX: what a driver can compile for any later GPU
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # what at::parallel_for is made of; the library is torch's own


class Build(BuildExtension):
    """Lets an install go on without the operators, and never overwrites a library that a running process has mapped."""

    def run(self) -> None:
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
            print(
                "\n" + "!" * 100 + "\n"
                "rlhf_lightning: the native operators could not be built; the slower plain PyTorch references will be "
                f"used.\n{type(error).__name__}: {error}\n"
                "A C++ compiler is needed; then install again. See docs/operators.md.\n" + "!" * 100,
                file=sys.stderr,
            )
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
    if MODE == "none":
        return []
    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
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
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    with_ptx = {f"{major}.{minor}" for major, minor in re.findall(r"code=compute_(\d+)(\d\w?)\b", flags)}
    found = [f"{major}.{minor}" for major, minor in re.findall(r"code=sm_(\d+)(\d\w?)\b", flags)]
    found.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    return [name + ("+PTX" if name in with_ptx else "") for name in found]


setup(
    packages=[*find_packages(include=["rlhf_lightning", "rlhf_lightning.*"]), "rlhf_lightning.configs"],
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
