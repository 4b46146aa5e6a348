// The arithmetic of the CPU operators: it takes pointers and sizes, no tensors, and starts no threads.
//
// kernels_impl.h is compiled once for each instruction set, in a namespace of its own. kernels() picks the best table that the
// machine can run, so a build made on one machine runs on another.
#pragma once

#include <cstdint>

namespace rlhf_lightning {

// 16-bit floats are passed as their bits, because these files may not include torch's headers: those headers' inline functions
// would be compiled for an instruction set that the machine may lack.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// The softmax statistics of the part of a row seen so far. With d = (x - max) / temperature: sum is the sum of exp(d), weighted
// that of exp(d) * d.
struct SoftmaxState {
  double max = -__builtin_inf();
  double sum = 0;
  double weighted = 0;
};

// What one row's gradient needs: the gradient of grad_log_prob * log p[token] + grad_entropy * entropy with respect to x, where
// log p = (x - shift) / temperature - log_sum.
struct RowGradient {
  double inverse_temperature;
  double shift;
  double log_sum;
  double entropy;
  double grad_log_prob;
  double grad_entropy;
  int64_t token;  // its index in this part of the row; outside [0, n) if another part has it
};

// Rows `stride` apart, or pieces of one long row.
template <typename T>
struct GaeRows {
  const T* rewards;
  const T* values;
  const bool* mask;
  T* advantages;  // null: compute next_value and next_advantage alone
  T* returns;
  int64_t rows;
  int64_t steps;
  int64_t stride;
  T gamma;
  T gamma_lambda;
  bool streaming;  // use streaming stores where the addresses allow them
  // One for each row. In: what follows its last step; out: what its first step passes on. Null: nothing follows.
  T* next_value;
  T* next_advantage;
};

template <typename T>
struct PolicyLoss {
  const T* log_probs;
  const T* old_log_probs;
  const T* advantages;
  T* loss;
  bool* clipped;
  T* slope;  // d loss / d log_probs
  T low;     // 1 - clip_low
  T high;    // 1 + clip_high
  T dual_clip;  // infinity: none
};

template <typename T>
struct ValueLoss {
  const T* values;
  const T* old_values;
  const T* returns;
  T* loss;
  bool* clipped;
  T* slope;  // d loss / d values
  T clip;    // infinity: none
};

// How rows are sampled; the contract is in rlhf_lightning/ops/sample_tokens.py.
struct SampleOptions {
  double inverse_temperature;
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
  bool greedy;
};

struct SampledToken {
  int64_t token;
  double log_prob;
  double entropy;
};

// Floats as unsigned integers of the same order.
template <typename A>
struct OrderedKey {
  using type = uint32_t;
};
template <>
struct OrderedKey<double> {
  using type = uint64_t;
};

// A row is summed in parts of this many elements, so that sampling finds the part that the draw falls in.
constexpr int64_t kSamplePart = 2048;

// Working memory for sampling from one row of n logits.
template <typename A>
struct SampleScratch {
  SoftmaxState* parts;  // [n / kSamplePart, rounded up]
  A* values;            // [n], as are the three below; needed by top-k and top-p alone
  A* masses;
  typename OrderedKey<A>::type* keys;
  int32_t* index;
};

// out = grad * slope, in the output type of the chosen kernel.
template <typename T>
struct LossGradient {
  const T* grad;
  bool same_grad;  // one number for all elements
  const T* slope;
  void* out;
};

// The kernels for one type of logits, and those for one compute type.
template <typename T>
struct SoftmaxKernels {
  void (*statistics)(const T* x, int64_t n, double inverse_temperature, SoftmaxState& state);
  // out may be x; streaming: use streaming stores, for an output larger than the caches
  void (*gradient)(const T* x, int64_t n, const RowGradient& row, bool streaming, T* out);
};
template <typename T>
struct SampleKernels {
  SampledToken (*row)(
      const T* x, int64_t n, const SampleOptions& options, double draw,
      const SampleScratch<typename Accumulate<T>::type>& scratch);
};
template <typename T>
struct LossKernels {
  void (*gae)(const GaeRows<T>&);
  void (*policy)(const PolicyLoss<T>&, int64_t begin, int64_t end);
  void (*value)(const ValueLoss<T>&, int64_t begin, int64_t end);
  void (*gradient)(const LossGradient<T>&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  SoftmaxKernels<float> softmax_float;
  SoftmaxKernels<Bfloat16> softmax_bfloat16;
  SoftmaxKernels<Float16> softmax_float16;
  SoftmaxKernels<double> softmax_double;
  SampleKernels<float> sample_float;
  SampleKernels<Bfloat16> sample_bfloat16;
  SampleKernels<Float16> sample_float16;
  SampleKernels<double> sample_double;
  LossKernels<float> loss_float;
  LossKernels<double> loss_double;
  void (*gradient_bfloat16)(const LossGradient<float>&, int64_t begin, int64_t end);
  void (*gradient_float16)(const LossGradient<float>&, int64_t begin, int64_t end);
};

namespace baseline {
Kernels kernels();
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLHF_LIGHTNING_X86 1
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}
namespace avx512_bf16 {
Kernels kernels();
}
#endif

// The best table for this machine. ATEN_CPU_CAPABILITY=default|avx2|avx512 asks for a lower one, as for torch's own kernels.
const Kernels& kernels();

}  // namespace rlhf_lightning
