// The kernels for x86-64 with AVX2, FMA and F16C.
#include "kernels.h"

#ifdef RLHF_LIGHTNING_X86
#include <immintrin.h>

// This holds for all that follows, so no header that other files share may be included below.
#pragma GCC target("avx2,fma,f16c")
#define KERNELS_AVX2
namespace rlhf_lightning::avx2 {
namespace {
#include "vectors.h"

#include "kernels_impl.h"
}  // namespace

Kernels kernels() {
  return table("avx2");
}
}  // namespace rlhf_lightning::avx2
#endif
