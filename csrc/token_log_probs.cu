// Log-probabilities of tokens and entropy from rows of logits: statistics of parts of the rows, then results of the rows.
//
// Launch of statistics_kernel: a group of kTeam threads takes one part of one row. Where a row fits one warp (kWarpRow),
// the group is a warp, and a block takes kThreads / 32 rows in x. Else the group is the block, which takes one row in x
// and one part of it in y. Each thread loads 16-byte vectors; the group reduces them to one state.
// Launch of results_kernel: one thread a row.
//
// With c = log2(e) / temperature, the state of a part is
//
//     max,   sum = sum of 2^d,   weighted = sum of 2^d * d,   d = (x - max) * c
//
// Two states merge into one: rescale both to the larger max, and add. Then log p = (x - max) / temperature - log(sum), and
// the entropy is log(sum) - log(2) * weighted / sum.
//
// The length of a row alone decides its parts, and an element's index in the row alone decides its thread: the results
// are the same bits in any batch, at any address and with any stride.
#undef NDEBUG  // keep the assertion on tokens
#include <cassert>

#include "softmax_rows.cuh"

namespace rlhf_lightning {
namespace {

struct Exp2Approx {
  template <typename A>
  __device__ __forceinline__ A operator()(A x) const {
    return exp2_approx(x);
  }
};

// The largest element of n 16-byte vectors. It may pass over a NaN, which the sum then carries.
template <typename T, int n>
__device__ __forceinline__ Compute<T> largest(const uint4 (&words)[n]) {
  Compute<T> tops[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    Compute<T> values[kVector<T>];
    widen<T>(words[i], values);
    tops[i] = values[0];
#pragma unroll
    for (int j = 1; j < kVector<T>; ++j) tops[i] = larger(tops[i], values[j]);
    tops[0] = larger(tops[0], tops[i]);
  }
  return tops[0];
}
// One instruction compares two 16-bit elements, before they are widened; it takes a number over a NaN.
template <typename T>
__device__ __forceinline__ unsigned int larger_pair(unsigned int a, unsigned int b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned int c;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#else
  Vector<T, 2> x, y;
  __builtin_memcpy(&x, &a, sizeof(x));
  __builtin_memcpy(&y, &b, sizeof(y));
  for (int i = 0; i < 2; ++i) x.at[i] = from_compute<T>(larger(to_compute(x.at[i]), to_compute(y.at[i])));
  __builtin_memcpy(&a, &x, sizeof(a));
  return a;
#endif
}
template <typename T, int n>
__device__ __forceinline__ float largest_by_pairs(const uint4 (&words)[n]) {
  unsigned int tops[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    tops[i] = larger_pair<T>(larger_pair<T>(words[i].x, words[i].y), larger_pair<T>(words[i].z, words[i].w));
    tops[0] = larger_pair<T>(tops[0], tops[i]);
  }
  float values[kVector<T>];
  widen<T>(make_uint4(tops[0], tops[0], tops[0], tops[0]), values);
  return larger(values[0], values[1]);
}
template <>
__device__ __forceinline__ float largest<__nv_bfloat16, kGroup>(const uint4 (&words)[kGroup]) {
  return largest_by_pairs<__nv_bfloat16>(words);
}
template <>
__device__ __forceinline__ float largest<__half, kGroup>(const uint4 (&words)[kGroup]) {
  return largest_by_pairs<__half>(words);
}

// Adds n 16-byte vectors to the state: one maximum, one rescaling, then the sum and the weighted sum, each as two
// independent chains of additions.
template <typename T, int n>
__device__ __forceinline__ void add(State<Compute<T>>& state, const uint4 (&words)[n], Compute<T> scale) {
  using A = Compute<T>;
  const A max = larger(state.max, largest<T>(words));
  raise(state, max, scale, Exp2Approx());
  A sum[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    A values[kVector<T>];
    widen<T>(words[i], values);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const A d = maximum((values[j] - max) * scale, kLowest<A>);
      const A power = exp2_approx(d);
      sum[j % 2] += power;
      weighted[j % 2] += power * d;
    }
  }
  state.sum += sum[0] + sum[1];
  state.weighted += weighted[0] + weighted[1];
}

// A 16-byte vector of x and otherwise -inf, which adds nothing.
template <typename T>
__device__ __forceinline__ uint4 word_of(T x) {
  Vector<T, kVector<T>> vector;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) vector.at[i] = i == 0 ? x : from_compute<T>(-Compute<T>(INFINITY));
  uint4 word;
  __builtin_memcpy(&word, &vector, sizeof(word));
  return word;
}

// Adds the 16-byte vectors [0, count) of x. Called by a group of kTeam threads, of which this thread is number `lane`. In each
// iteration a thread takes kGroup vectors, and loads the next ones while it computes.
template <int kTeam, bool kAligned, typename T>
__device__ __forceinline__ void add_words(
    State<Compute<T>>& state, const T* x, int count, int lane, Compute<T> scale) {
  const uint4 nothing = word_of(from_compute<T>(-Compute<T>(INFINITY)));
  uint4 next[kGroup];
  const auto fetch = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int word = begin + i * kTeam + lane;
      next[i] = nothing;
      if (word < count) next[i] = load_word<kAligned>(x + static_cast<int64_t>(word) * kVector<T>);
    }
  };
  if (kAligned) fetch(0);
  for (int begin = 0; begin < count; begin += kGroup * kTeam) {
    if (!kAligned) fetch(begin);  // twice as many loads leave no registers for the next ones
    uint4 here[kGroup];
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
  auto state = empty_state<A>();
  if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    add_words<kTeam, true>(state, x + begin * kVector<T>, count, lane, scale);
  } else {
    add_words<kTeam, false>(state, x + begin * kVector<T>, count, lane, scale);
  }
  const int64_t rest = words * kVector<T> + lane;
  if (blockIdx.y == gridDim.y - 1 && rest < rows.columns) {
    const uint4 last[1] = {word_of(x[rest])};
    add<T>(state, last, scale);
  }
  const auto combine = [scale](const State<A>& a, const State<A>& b) { return merge(a, b, scale, Exp2Approx()); };
  if constexpr (kTeam == kWarp) {
    state = warp_reduce(state, combine);
  } else {
    static_assert(std::is_trivially_default_constructible_v<State<A>>, "shared memory is not initialised");
    __shared__ State<A> shared[kTeam / kWarp];
    state = block_reduce<kTeam>(state, shared, combine);
  }
  if (lane != 0) return;
  states[blockIdx.y * rows.count + i] = state;
  const int64_t column = tokens[i] - rows.first;
  if (blockIdx.y == 0 && column >= 0 && column < rows.columns) token_logits[i] = to_compute(x[column]);
}

// One thread a row. In double, which costs little: a row has one logarithm.
template <typename A>
__global__ void __launch_bounds__(kThreads) results_kernel(
    const State<A>* states, int64_t states_count, const A* token_logits, const int64_t* tokens, int64_t vocabulary,
    int64_t count, double inverse_temperature, A* log_probs, A* entropy, A* shift, A* log_sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  State<double> all{kSmallest<A>, 0.0, 0.0};
  for (int64_t k = 0; k < states_count; ++k) {
    const State<A> state = states[k * count + i];
    const State<double> wide{state.max, state.sum, state.weighted};
    all = merge(all, wide, inverse_temperature * kLog2E, Exp2Approx());
  }
  const double logarithm = log(all.sum);
  log_probs[i] = static_cast<A>((token_logits[i] - all.max) * inverse_temperature - logarithm);
  entropy[i] = static_cast<A>(logarithm - kLog2 * all.weighted / all.sum);
  shift[i] = static_cast<A>(all.max);
  log_sum[i] = static_cast<A>(logarithm);
  assert(tokens[i] >= 0 && tokens[i] < vocabulary);
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
    return with_teams<T>(logits, [&](auto team, Grid grid) {
      return launch(
          statistics_kernel<T, decltype(team)::value>, grid, kThreads, 0, stream,
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
        results_kernel<A>, {(count + kThreads - 1) / kThreads}, kThreads, 0, stream,
        static_cast<const State<A>*>(states), states_count, static_cast<const A*>(token_logits), tokens, vocabulary,
        count, 1 / temperature, static_cast<A*>(results.log_probs), static_cast<A*>(results.entropy),
        static_cast<A*>(results.shift), static_cast<A*>(results.log_sum));
  });
}

}  // namespace rlhf_lightning
