// Chooses the instruction set, once.
#include "kernels.h"

#include <ATen/Version.h>

#include <string>

namespace rlhf_lightning {

namespace {
Kernels choose() {
#ifdef RLHF_LIGHTNING_X86
  const std::string capability = at::get_cpu_capability();
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
