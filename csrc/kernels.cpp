// Chooses the table of CPU kernels for this machine's instruction set, once a process.
#include "kernels.h"

#include <ATen/Version.h>

#include <cstdlib>
#include <string>

namespace rlhf_lightning {

namespace {
Kernels choose() {
#ifdef RLHF_LIGHTNING_X86
  const std::string capability = at::get_cpu_capability();
  // ATEN_CPU_CAPABILITY=avx512 asks for AVX-512 without its extensions.
  const bool named = std::getenv("ATEN_CPU_CAPABILITY") != nullptr;
  if (capability == "AVX512" && !named && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::kernels();
  if (capability == "AVX512") return avx512::kernels();
  if (capability == "AVX2" && __builtin_cpu_supports("f16c")) return avx2::kernels();
#endif
  return baseline::kernels();
}
}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace rlhf_lightning
