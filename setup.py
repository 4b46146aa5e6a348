"""Builds the native operators, csrc/ -> rlhf_lightning/_C; everything else is declared in pyproject.toml.

RLHF_LIGHTNING_BUILD=auto      the default: build, and where that fails install without, saying so on stderr
RLHF_LIGHTNING_BUILD=required  a build that fails is an error
RLHF_LIGHTNING_BUILD=none      do not build: the operators' plain PyTorch references are used

CUDA sources are compiled too where torch is a CUDA build and nvcc is found, for the architectures that
TORCH_CUDA_ARCH_LIST names. No GPU and no network is needed.
"""

import os
import sys
from glob import glob

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

MODE = os.environ.get("RLHF_LIGHTNING_BUILD", "auto")
if MODE not in ("auto", "required", "none"):
    sys.exit(f"RLHF_LIGHTNING_BUILD must be auto, required or none, got {MODE}")

# No fused multiply-add unless the source says so: GAE and the value loss are then the same bits on every machine, and
# the policy loss however its elements are split. No -march: the kernels choose their instruction set at run time.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-g0"]
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

    def copy_file(self, infile, outfile, *args, **kwargs):  # type: ignore[no-untyped-def]
        partial = f"{outfile}.partial"
        super().copy_file(infile, partial, *args, **kwargs)
        os.replace(partial, outfile)
        return outfile, True


def extensions() -> list:
    """The one extension, of the C++ sources, and of the CUDA sources where they can be compiled."""
    if MODE == "none":
        return []
    cuda_sources = sorted(glob("csrc/*.cu"))
    with_cuda = bool(cuda_sources) and torch.version.cuda is not None and CUDA_HOME is not None
    kind = CUDAExtension if with_cuda else CppExtension
    return [
        kind(
            "rlhf_lightning._C",
            sources=sorted(glob("csrc/*.cpp")) + (cuda_sources if with_cuda else []),
            depends=sorted(glob("csrc/*.h")),
            define_macros=[("RLHF_LIGHTNING_CUDA", "1")] if with_cuda else [],
            extra_compile_args={"cxx": CXX_FLAGS + OPENMP, "nvcc": ["-O3"]},
            extra_link_args=OPENMP,
        )
    ]


setup(
    packages=[*find_packages(include=["rlhf_lightning", "rlhf_lightning.*"]), "rlhf_lightning.configs"],
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
