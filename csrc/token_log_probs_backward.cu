// The gradient of rows of logits, for one part of the columns at a time.
//
// Launch: as statistics_kernel of token_log_probs.cu. A group of kTeam threads, one warp for short rows and else the block,
// takes one part of one row; rows lie along x of the grid and parts along y. A thread loads 16-byte vectors of logits and
// stores their gradients. c = log2(e) / temperature.
#include "softmax_rows.cuh"

namespace rlhf_lightning {
namespace {

template <typename A>
struct GradientRows {
  const A *grad_log_probs, *grad_entropy, *entropy, *shift, *log_sum;
};

// With p the softmax, g and h the incoming gradients of log_probs and entropy, and H the entropy:
//
//     out = (g * ([token] - p) - h * p * (log p + H)) / temperature, log p = log(2) * t - log_sum, t = (x - shift) * c
//         = 2^t * (offset + slope * t), but for the token itself
template <typename A>
struct Gradient {
  A shift, scale, slope, offset;
  A g, h, entropy, log_sum, inverse_temperature;

  __device__ __forceinline__ Gradient(const GradientRows<A>& rows, int64_t i, A scale, A inverse_temperature)
      : shift(rows.shift[i]), scale(scale), g(rows.grad_log_probs[i]), h(rows.grad_entropy[i]),
        entropy(rows.entropy[i]), log_sum(rows.log_sum[i]), inverse_temperature(inverse_temperature) {
    const A factor = -exp(-log_sum) * inverse_temperature;
    slope = factor * h * A(kLog2);
    offset = factor * (g + h * (entropy - log_sum));
  }
  __device__ __forceinline__ A operator()(A x) const {
    const A t = maximum((x - shift) * scale, kLowest<A>);
    return exp2_approx(t) * (offset + slope * t);
  }
  // Computes 1 - p in the form that keeps its digits.
  __device__ __forceinline__ A at_token(A x) const {
    const A log_p = maximum((x - shift) * inverse_temperature - log_sum, kLowest<A> * A(kLog2));
    return (-g * expm1(log_p) - h * exp(log_p) * (log_p + entropy)) * inverse_temperature;
  }
};

// Maps the 16-byte vectors [0, count) of x to those of out. out is aligned; the two may be the same memory.
template <int kTeam, bool kAligned, typename T>
__device__ __forceinline__ void write_words(
    const T* x, T* out, int count, int lane, const Gradient<Compute<T>>& gradient) {
  for (int begin = lane; begin < count; begin += kGroup * kTeam) {
    uint4 words[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int word = begin + i * kTeam;
      if (word < count) words[i] = load_word<kAligned>(x + static_cast<int64_t>(word) * kVector<T>);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int word = begin + i * kTeam;
      if (word >= count) continue;
      Compute<T> values[kVector<T>];
      widen<T>(words[i], values);
      Vector<T, kVector<T>> vector;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) vector.at[j] = from_compute<T>(gradient(values[j]));
      store(out + static_cast<int64_t>(word) * kVector<T>, vector);
    }
  }
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) gradient_kernel(
    Rows<T> rows, const int64_t* tokens, Compute<T> scale, Compute<T> inverse_temperature,
    GradientRows<Compute<T>> inputs, T* out, int64_t out_stride) {
  using A = Compute<T>;
  constexpr int width = kVector<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (i >= rows.count) return;
  const int lane = threadIdx.x % kTeam;
  const T* x = rows.row(i);
  out += i * out_stride;
  const int64_t token = tokens[i] - rows.first;
  const Gradient<A> gradient(inputs, i, scale, inverse_temperature);
  // The elements before the first aligned vector of out, then the vectors; the last elements follow.
  const int64_t before = (16 - reinterpret_cast<uintptr_t>(out) % 16) % 16 / sizeof(T);
  const int64_t head = before < rows.columns ? before : rows.columns;
  const int64_t words = words_of<T>(rows.columns - head);
  const auto [begin, count] = part_of_block(words);
  x += head + begin * width;
  T* words_out = out + head + begin * width;
  // The thread that stores the token's vector stores the token's element after it. It reads the logit first, because the
  // store may overwrite it.
  const int64_t place = token - head - begin * width;
  const bool own = place >= 0 && place < static_cast<int64_t>(count) * width && place / width % kTeam == lane;
  const A token_logit = own ? to_compute(x[place]) : A(0);
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    write_words<kTeam, true>(x, words_out, count, lane, gradient);
  } else {
    write_words<kTeam, false>(x, words_out, count, lane, gradient);
  }
  if (own) words_out[place] = from_compute<T>(gradient.at_token(token_logit));
  const int64_t single = lane < head ? lane : words * width + lane;
  if (blockIdx.y == 0 && single < rows.columns) {
    const A value = to_compute(rows.row(i)[single]);
    out[single] = from_compute<T>(single == token ? gradient.at_token(value) : gradient(value));
  }
}

}  // namespace

cudaError_t softmax_gradient(
    const LogitRows& logits, const int64_t* tokens, double temperature, const RowInputs& rows, void* out,
    int64_t out_stride, cudaStream_t stream) {
  return with_type(logits.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using A = Compute<T>;
    const auto input = [](const void* x) { return static_cast<const A*>(x); };
    const GradientRows<A> inputs{
        input(rows.grad_log_probs), input(rows.grad_entropy), input(rows.entropy), input(rows.shift),
        input(rows.log_sum)};
    return with_teams<T>(logits, [&](auto team, Grid grid) {
      return launch(
          gradient_kernel<T, decltype(team)::value>, grid, kThreads, 0, stream,
          rows_of<T>(logits), tokens, static_cast<A>(kLog2E / temperature), static_cast<A>(1 / temperature),
          inputs, static_cast<T*>(out), out_stride);
    });
  });
}

}  // namespace rlhf_lightning
