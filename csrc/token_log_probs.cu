// Softmax statistics, results and gradients of rows of logits. With c = log2(e) / temperature, a part of a row is known by
//
//     max,   sum = sum of 2^d,   weighted = sum of 2^d * d,   d = (x - max) * c
//
// and two parts make one: raise both to the larger max, add. log p = (x - max) / temperature - log(sum), and the entropy is
// log(sum) - log(2) * weighted / sum.
//
// A row is cut by its length alone, and its elements go to threads by their place in the row alone: its results are the same
// bits in any batch, at any address and with any stride.
#include "token_log_probs_launch.h"

#undef NDEBUG  // the assertion on tokens stays
#include <cassert>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "device.cuh"

namespace rlhf_lightning {
namespace {

constexpr int kThreads = 256;
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 ? 2 : 4;  // that many registers are left for a thread
constexpr int kGroup = 4;            // 16-byte loads of a thread in flight
constexpr int64_t kPart = 4096;      // 16-byte words of a row that one block takes: 64 KiB
constexpr int64_t kWarpRow = 1024;   // words of the longest row that one warp takes alone
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLog2 = 0.6931471805599453;

// 2^x for x <= 0 to 2 units in the last place; 0 where that is below the smallest normal number.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// The larger; NaN if either is. fmax would pass over the NaN.
__device__ __forceinline__ float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return b > a || b != b ? b : a;
#endif
}
__device__ __forceinline__ double maximum(double a, double b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// Powers of two below this are as good as 2^-inf, which is 0, but can be multiplied by 0.
template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-1100) : A(-300);
template <typename A>
constexpr A kSmallest = sizeof(A) == 8 ? A(-DBL_MAX) : A(-FLT_MAX);

// Of nothing: finite, so that a part of nothing but -inf has a sum of 0, not NaN.
template <typename A>
struct State {
  A max = kSmallest<A>;
  A sum = 0;
  A weighted = 0;
};

template <typename A>
__device__ __forceinline__ void raise(State<A>& state, A max, A scale) {
  const A d = maximum((state.max - max) * scale, kLowest<A>);
  const A factor = exp2_of(d);
  state.weighted = factor * (state.weighted + d * state.sum);
  state.sum *= factor;
  state.max = max;
}

template <typename A>
__device__ __forceinline__ State<A> merge(State<A> a, State<A> b, A scale) {
  const A max = larger(a.max, b.max);
  raise(a, max, scale);
  raise(b, max, scale);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

// Adds n packs of elements: one maximum, one rescaling, then a sum and a weighted sum in two threads of addition.
template <typename T, int width, int n>
__device__ __forceinline__ void add(State<Compute<T>>& state, const Pack<T, width> (&packs)[n], Compute<T> scale) {
  using A = Compute<T>;
  A tops[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    tops[i] = to_compute(packs[i].at[0]);
#pragma unroll
    for (int j = 1; j < width; ++j) tops[i] = larger(tops[i], to_compute(packs[i].at[j]));
  }
  A max = state.max;
#pragma unroll
  for (int i = 0; i < n; ++i) max = larger(max, tops[i]);
  raise(state, max, scale);
  A sum[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const A d = maximum((to_compute(packs[i].at[j]) - max) * scale, kLowest<A>);
      const A power = exp2_of(d);
      sum[j % 2] += power;
      weighted[j % 2] += power * d;
    }
  }
  state.sum += sum[0] + sum[1];
  state.weighted += weighted[0] + weighted[1];
}

// 16 bytes from any element's address. Where they straddle two aligned words both are loaded, and what is left of them lies
// in words that hold a part of the 16 bytes.
template <bool kAligned, typename T>
__device__ __forceinline__ Pack<T, kVector<T>> load_word(const T* x) {
  if constexpr (kAligned) return load_streaming<kVector<T>>(x);
  const uintptr_t address = reinterpret_cast<uintptr_t>(x);
  const unsigned int shift = static_cast<unsigned int>(address % 16);
  const uint4* word = reinterpret_cast<const uint4*>(address - shift);
  const uint4 low = __ldcs(word), high = __ldcs(word + (shift != 0));
  unsigned int parts[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) parts[i] = shift & 8 ? parts[i + 2] : parts[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) parts[i] = shift & 4 ? parts[i + 1] : parts[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    parts[i] = static_cast<unsigned int>((static_cast<uint64_t>(parts[i + 1]) << 32 | parts[i]) >> (shift % 4 * 8));
  }
  Pack<T, kVector<T>> pack;
  __builtin_memcpy(&pack, parts, sizeof(pack));
  return pack;
}

template <typename T>
struct Rows {
  const T* data;
  int64_t count, columns, first, inner, outer_stride, inner_stride;
  __device__ __forceinline__ const T* row(int64_t i) const {
    return i < inner ? data + i * inner_stride : data + i / inner * outer_stride + i % inner * inner_stride;
  }
};

// Words are cut into parts of equal length for one block each: as many as the grid has in y.
constexpr int64_t kMostParts = 65535;  // that a grid has in y; longer parts for a row that would need more
inline int64_t parts_of(int64_t words) {
  const int64_t parts = words > kPart ? (words + kPart - 1) / kPart : 1;
  return parts < kMostParts ? parts : kMostParts;
}
struct Part {
  int64_t begin;
  int count;
};
__device__ __forceinline__ Part part_of_block(int64_t words) {
  const int64_t length = (words + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * length;
  const int64_t left = words > begin ? words - begin : 0;
  return {begin, static_cast<int>(left < length ? left : length)};
}

// Of a row's elements all but the last few are taken as 16-byte words, counted from its first element. The last of them, up
// to two words' worth, go one to a thread: no load needs to reach beyond the row's end, wherever in memory it starts.
template <typename T>
__host__ __device__ __forceinline__ int64_t words_of(int64_t columns) {
  const int64_t words = columns / kVector<T>;
  return words > 0 ? words - 1 : 0;
}

// The team of kTeam threads in which this thread is number `lane` takes words [0, count) of x, kGroup of them at a time, and
// has the next loads under way while it computes.
template <int kTeam, bool kAligned, typename T>
__device__ __forceinline__ void add_words(
    State<Compute<T>>& state, const T* x, int count, int lane, Compute<T> scale) {
  Pack<T, kVector<T>> next[kGroup];
  const auto fetch = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int word = begin + i * kTeam + lane;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) next[i].at[j] = from_compute<T>(-Compute<T>(INFINITY));
      if (word < count) next[i] = load_word<kAligned>(x + static_cast<int64_t>(word) * kVector<T>);
    }
  };
  if (kAligned) fetch(0);
  for (int begin = 0; begin < count; begin += kGroup * kTeam) {
    if (!kAligned) fetch(begin);  // its loads are twice as many: there are no registers to hold the next ones
    Pack<T, kVector<T>> here[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) here[i] = next[i];
    if (kAligned) fetch(begin + kGroup * kTeam);
    add<T>(state, here, scale);
  }
}

template <typename T, int kTeam>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) statistics_kernel(
    Rows<T> rows, const int64_t* tokens, Compute<T> scale, State<Compute<T>>* states, Compute<T>* token_logits) {
  using A = Compute<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (i >= rows.count) return;
  const int lane = threadIdx.x % kTeam;
  const T* x = rows.row(i);
  const int64_t words = words_of<T>(rows.columns);
  const auto [begin, count] = part_of_block(words);
  State<A> state;
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    add_words<kTeam, true>(state, x + begin * kVector<T>, count, lane, scale);
  } else {
    add_words<kTeam, false>(state, x + begin * kVector<T>, count, lane, scale);
  }
  const int64_t rest = words * kVector<T> + lane;
  if (blockIdx.y == gridDim.y - 1 && rest < rows.columns) {
    const Pack<T, 1> last[1] = {{x[rest]}};
    add<T>(state, last, scale);
  }
  const auto combine = [scale](const State<A>& a, const State<A>& b) { return merge(a, b, scale); };
  if constexpr (kTeam == kWarp) {
    state = warp_reduce(state, combine);
  } else {
    __shared__ State<A> shared[kTeam / kWarp];
    state = block_reduce<kTeam>(state, shared, combine);
  }
  if (lane != 0) return;
  states[blockIdx.y * rows.count + i] = state;
  const int64_t column = tokens[i] - rows.first;
  if (blockIdx.y == 0 && column >= 0 && column < rows.columns) token_logits[i] = to_compute(x[column]);
}

// One thread a row, in double: there is one logarithm in a whole row.
template <typename A>
__global__ void __launch_bounds__(kThreads) results_kernel(
    const State<A>* states, int64_t states_count, const A* token_logits, const int64_t* tokens, int64_t vocabulary,
    int64_t count, double inverse_temperature, A* log_probs, A* entropy, A* shift, A* log_sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  State<double> all{kSmallest<A>, 0.0, 0.0};
  for (int64_t k = 0; k < states_count; ++k) {
    const State<A> state = states[k * count + i];
    all = merge(all, State<double>{state.max, state.sum, state.weighted}, inverse_temperature * kLog2E);
  }
  const double logarithm = log(all.sum);
  log_probs[i] = static_cast<A>((token_logits[i] - all.max) * inverse_temperature - logarithm);
  entropy[i] = static_cast<A>(logarithm - kLog2 * all.weighted / all.sum);
  shift[i] = static_cast<A>(all.max);
  log_sum[i] = static_cast<A>(logarithm);
  assert(tokens[i] >= 0 && tokens[i] < vocabulary);
}

template <typename A>
struct GradientRows {
  const A *grad_log_probs, *grad_entropy, *entropy, *shift, *log_sum;
};

// With p the softmax, g and h the incoming gradients of log_probs and entropy, and H the entropy:
//
//     out = (g * ([token] - p) - h * p * (log p + H)) / temperature,   log p = log(2) * t - log_sum,   t = (x - shift) * c
//         = 2^t * (offset + slope * t)                                 but for the token itself
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
    return exp2_of(t) * (offset + slope * t);
  }
  // 1 - p is taken where it keeps its digits.
  __device__ __forceinline__ A at_token(A x) const {
    const A log_p = maximum((x - shift) * inverse_temperature - log_sum, kLowest<A> * A(kLog2));
    return (-g * expm1(log_p) - h * exp(log_p) * (log_p + entropy)) * inverse_temperature;
  }
};

// Words [0, count) of x to those of out, which is aligned; the two may be the same memory.
template <int kTeam, bool kAligned, typename T>
__device__ __forceinline__ void write_words(
    const T* x, T* out, int count, int lane, const Gradient<Compute<T>>& gradient) {
  for (int begin = lane; begin < count; begin += kGroup * kTeam) {
    Pack<T, kVector<T>> packs[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int word = begin + i * kTeam;
      if (word < count) packs[i] = load_word<kAligned>(x + static_cast<int64_t>(word) * kVector<T>);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int word = begin + i * kTeam;
      if (word >= count) continue;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) packs[i].at[j] = from_compute<T>(gradient(to_compute(packs[i].at[j])));
      store(out + static_cast<int64_t>(word) * kVector<T>, packs[i]);
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
  // Elements before the first aligned word of out, the words, and the last elements.
  const int64_t before = (16 - reinterpret_cast<uintptr_t>(out) % 16) % 16 / sizeof(T);
  const int64_t head = before < rows.columns ? before : rows.columns;
  const int64_t words = words_of<T>(rows.columns - head);
  const auto [begin, count] = part_of_block(words);
  x += head + begin * width;
  T* words_out = out + head + begin * width;
  // The token's element is written last, by the thread that writes its word; the logit may be overwritten then.
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

// Calls f(a null pointer of this type).
template <typename F>
cudaError_t with_type(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f(static_cast<float*>(nullptr));
    case Element::kBfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Element::kHalf: return f(static_cast<__half*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

template <typename T>
Rows<T> rows_of(const LogitRows& logits) {
  return {static_cast<const T*>(logits.data), logits.count,        logits.columns,     logits.first, logits.inner,
          logits.outer_stride,                logits.inner_stride};
}

// A warp takes a short row alone, and needs no barrier; a long one is cut among blocks.
template <typename T, typename F>
cudaError_t with_teams(const LogitRows& logits, const F& f) {
  const int64_t words = words_of<T>(logits.columns), rows = words > kWarpRow ? 1 : kThreads / kWarp;
  const dim3 grid(static_cast<unsigned>((logits.count + rows - 1) / rows), static_cast<unsigned>(parts_of(words)));
  return rows == 1 ? f(std::integral_constant<int, kThreads>(), grid) : f(std::integral_constant<int, kWarp>(), grid);
}

}  // namespace

int64_t softmax_states(Element type, int64_t columns) {
  int64_t parts = 1;
  with_type(type, [&](auto* null) {
    parts = parts_of(words_of<std::remove_pointer_t<decltype(null)>>(columns));
    return cudaSuccess;
  });
  return parts;
}

int64_t softmax_state_bytes(Element type) {
  return type == Element::kDouble ? sizeof(State<double>) : sizeof(State<float>);
}

cudaError_t softmax_statistics(
    const LogitRows& logits, const int64_t* tokens, double temperature, void* states, void* token_logits,
    cudaStream_t stream) {
  return with_type(logits.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    using A = Compute<T>;
    return with_teams<T>(logits, [&](auto team, dim3 grid) {
      return launch(
          statistics_kernel<T, decltype(team)::value>, grid, dim3(kThreads), 0, stream,
          rows_of<T>(logits), tokens, static_cast<A>(kLog2E / temperature),
          static_cast<State<A>*>(states), static_cast<A*>(token_logits));
    });
  });
}

cudaError_t softmax_results(
    Element type, const void* states, int64_t states_count, const void* token_logits, const int64_t* tokens,
    int64_t vocabulary, int64_t count, double temperature, const RowOutputs& results, cudaStream_t stream) {
  return with_type(type, [&](auto* null) {
    using A = Compute<std::remove_pointer_t<decltype(null)>>;
    return launch(
        results_kernel<A>, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream,
        static_cast<const State<A>*>(states), states_count, static_cast<const A*>(token_logits), tokens, vocabulary,
        count, 1 / temperature, static_cast<A*>(results.log_probs), static_cast<A*>(results.entropy),
        static_cast<A*>(results.shift), static_cast<A*>(results.log_sum));
  });
}

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
    return with_teams<T>(logits, [&](auto team, dim3 grid) {
      return launch(
          gradient_kernel<T, decltype(team)::value>, grid, dim3(kThreads), 0, stream,
          rows_of<T>(logits), tokens, static_cast<A>(kLog2E / temperature), static_cast<A>(1 / temperature),
          inputs, static_cast<T*>(out), out_stride);
    });
  });
}

}  // namespace rlhf_lightning
