// The kernels of kernels_avx512.cpp for x86-64 with AVX512_BF16, which converts to bfloat16 in one instruction.
#include "kernels.h"

#ifdef RLHF_LIGHTNING_X86
#include <immintrin.h>

// This holds for all that follows, so no header that other files share may be included below.
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
