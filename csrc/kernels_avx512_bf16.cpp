// The kernels of kernels_avx512.cpp for x86-64 that also converts to bfloat16 in one instruction.
#include "kernels.h"

#ifdef RLHF_LIGHTNING_X86
#include <immintrin.h>

// For all that follows, which is why nothing that other files share is included below here.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the compiler's own immintrin.h: GCC bug 105593
#define KERNELS_AVX512
#define KERNELS_BF16
namespace rlhf_lightning::avx512_bf16 {
namespace {
#include "vectors.h"

#include "kernels_impl.h"
}  // namespace

Kernels kernels() {
  return table("avx512_bf16");
}
}  // namespace rlhf_lightning::avx512_bf16
#endif
