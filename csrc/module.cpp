// The Python module of the shared object: importing it registers the operators, and build_info() tells what was built.
#include <ATen/Version.h>
#include <torch/extension.h>

#include "kernels.h"
#include "large_memory.h"

#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)

namespace {

py::dict build_info() {
  py::list instruction_sets, architectures;
  instruction_sets.append("baseline");
#ifdef RLHF_LIGHTNING_X86
  instruction_sets.append("avx2");
  instruction_sets.append("avx512");
  instruction_sets.append("avx512_bf16");
#endif
  py::dict info;
  info["version"] = TEXT(RLHF_LIGHTNING_VERSION);
  info["torch"] = TEXT(RLHF_LIGHTNING_TORCH_VERSION);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cpu_instruction_sets"] = instruction_sets;
  info["cpu_instruction_set_in_use"] = rlhf_lightning::kernels().name;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef RLHF_LIGHTNING_CUDA_ARCHITECTURES
  info["cuda"] = true;
  architectures = py::str(TEXT(RLHF_LIGHTNING_CUDA_ARCHITECTURES)).attr("split")(":");
#else
  info["cuda"] = false;
#endif
  info["cuda_architectures"] = architectures;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of rlhf_lightning; see rlhf_lightning/ops/.";
  m.def(
      "release_kept_memory", &rlhf_lightning::release_kept_memory,
      "Gives the memory of large results, kept for the next ones, back to the system.");
  m.def(
      "keep_memory", &rlhf_lightning::keep_memory, py::arg("on"),
      "Whether the memory of large CPU tensors is kept, when they are freed, for the next ones.");
  m.def("build_info", &build_info, "What this library was built with and for.");
}
