// The kernels for x86-64 with AVX-512 F, BW, DQ and VL, which torch requires of a machine that it calls AVX512.
#include "kernels.h"

#ifdef RLHF_LIGHTNING_X86
#include <immintrin.h>

// This holds for all that follows, so no header that other files share may be included below.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the compiler's own immintrin.h: GCC bug 105593
#define KERNELS_AVX512
namespace rlhf_lightning::avx512 {
namespace {
#include "vectors.h"

#include "kernels_impl.h"
}  // namespace

Kernels kernels() {
  return table("avx512");
}
}  // namespace rlhf_lightning::avx512
#endif
