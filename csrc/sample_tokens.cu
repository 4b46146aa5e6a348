// Samples a token from each row of logits: the contract is in rlhf_lightning/ops/sample_tokens.py.
//
// Launch: one block of 512 threads a row. Each warp sums one segment of neighbouring columns, so the block reads the row once.
// A loop over the segments' sums finds the segment that the draw falls in, and a block-wide scan of that segment finds the
// token. The order of all sums depends on the number of columns alone: a row's result is the same bits in any batch and at
// any address.
//
// Top-k and top-p need a threshold: the largest logit at which the weight of the logits above it (their number, or their mass)
// reaches a target. The block finds it by radix selection, four bits a pass over the row, which by then is in the L2 cache; it
// sorts and stores nothing. The same kernel then samples from the logits that pass.
#include "sample_tokens_launch.h"

#include <type_traits>

#include "device.cuh"
#include "ordered_keys.cuh"
#include "softmax_state.cuh"

namespace rlhf_lightning {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectors = 4;   // 16-byte vectors that a thread loads together
constexpr int kDigit = 4;   // bits of a key that a pass of select() finds
constexpr int kSteps = (1 << kDigit) - 1;

struct Shared {
  double max[kWarps], sum[kWarps], weighted[kWarps];  // one for each segment
  double factor[kWarps], mass[kWarps];                // 2^(segment's maximum - row's maximum); factor * sum
  double totals[kWarps];  // one for each warp, or for each digit of select()
  double steps[kWarps][kSteps];
  int reached[kWarps], last[kWarps];
  int index;
};

// The row of a block. All threads of the block must call every method.
template <typename T, bool by_vector, bool filtered>
struct Row {
  using A = Compute<T>;
  static constexpr int kWidth = kVector<T>;
  static constexpr int kStride = kWarp * kWidth;

  const T* x;
  int columns;
  int segment;  // columns a warp, a multiple of kStride
  A scale;      // log2(e) / temperature
  Shared& shared;
  Filter<A> filter;
  double max, sum, weighted;  // of the logits that pass the filter

  __device__ Row(const T* x, int columns, A scale, Shared& shared)
      : x(x), columns(columns), scale(scale), shared(shared) {
    segment = (columns + kWarps * kStride - 1) / (kWarps * kStride) * kStride;
  }

  __device__ __forceinline__ int warp() const { return threadIdx.x / kWarp; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarp; }
  // A segment's first column; the last segments may be cut short, or empty.
  __device__ __forceinline__ int begin_of(int number) const {
    const int64_t begin = static_cast<int64_t>(number) * segment;
    return begin < columns ? static_cast<int>(begin) : columns;
  }
  __device__ __forceinline__ bool passes(A value, int index) const {
    if constexpr (filtered) return filter(value, index);
    return true;
  }

  // Calls f(values, index of each vector's first) over this warp's segment; beyond its end the values are -inf.
  template <typename F>
  __device__ __forceinline__ void vectors(const F& f) const {
    const int begin = begin_of(warp()), end = begin_of(warp() + 1);
    for (int first = begin; first < end; first += kVectors * kStride) {
      Vector<T, kWidth> vector[kVectors];
      A value[kVectors][kWidth];
      int at[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        at[i] = first + i * kStride + lane() * kWidth;
        if (by_vector && end - at[i] >= kWidth) {
          vector[i] = load<kWidth>(x + at[i]);
        } else {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            vector[i].at[j] = at[i] + j < end ? load<1>(x + at[i] + j).at[0] : from_compute<T>(A(-INFINITY));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) value[i][j] = to_compute(vector[i].at[j]);
      }
      f(value, at, end);
    }
  }
  // Calls f(value, index) for each column of this warp's segment.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    vectors([&](const A(&value)[kVectors][kWidth], const int(&at)[kVectors], int end) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (at[i] + j < end) f(value[i][j], at[i] + j);
        }
      }
    });
  }

  // Sets max, sum and weighted, and the shared max, factor and mass of the segments.
  __device__ void statistics() {
    const auto power_of = [](auto d) { return exp2_of(d); };
    auto own = empty_state<A>();
    vectors([&](const A(&value)[kVectors][kWidth], const int(&at)[kVectors], int) {
      A kept[kVectors][kWidth], top = own.max;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          kept[i][j] = passes(value[i][j], at[i] + j) ? value[i][j] : A(-INFINITY);
          top = kept[i][j] > top ? kept[i][j] : top;
        }
      }
      raise(own, top, scale, power_of);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const A d = maximum((kept[i][j] - top) * scale, kLowest<A>);
          const A power = exp2_of(d);
          own.sum += power;
          own.weighted += power * d;
        }
      }
    });
    const double wide = scale;
    const auto both = [&](const State<double>& a, const State<double>& b) { return merge(a, b, wide, power_of); };
    const auto all = warp_reduce(State<double>{own.max, own.sum, own.weighted}, both);
    if (lane() == 0) {
      shared.max[warp()] = all.max;
      shared.sum[warp()] = all.sum;
      shared.weighted[warp()] = all.weighted;
    }
    __syncthreads();
    max = shared.max[0];
    for (int i = 1; i < kWarps; ++i) max = shared.max[i] > max ? shared.max[i] : max;
    if (threadIdx.x < kWarps) {
      const int i = threadIdx.x;
      const double d = maximum((shared.max[i] - max) * wide, kLowest<double>);
      shared.factor[i] = exp2(d);
      shared.mass[i] = shared.factor[i] * shared.sum[i];
      shared.weighted[i] = shared.factor[i] * (shared.weighted[i] + d * shared.sum[i]);
    }
    __syncthreads();
    sum = weighted = 0;
    for (int i = 0; i < kWarps; ++i) {
      sum += shared.mass[i];
      weighted += shared.weighted[i];
    }
    __syncthreads();  // all of `shared` may be written again
  }

  // Writes the segments' weights to shared.mass, and 1 to shared.factor.
  template <typename F>
  __device__ void measure(const F& weight) {
    double own = 0;
    each([&](A value, int index) { own += weight(value, index); });
    own = warp_reduce(own, [](double a, double b) { return a + b; });
    if (lane() == 0) {
      shared.mass[warp()] = own;
      shared.factor[warp()] = 1;
    }
    __syncthreads();
  }

  // Returns the first column at which the cumulative weight is above `point`. shared.mass holds the segments' weights; within
  // a segment a column weighs factor * weight(value, index, segment). Where the point is above them all, by rounding or for
  // a draw of 1, returns the last column that has a weight.
  template <typename F>
  __device__ int find(double point, const F& weight) {
    double before = 0, inside = INFINITY;  // past the last segment that has a weight, unless the loop finds the point
    int chosen = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (!(shared.mass[i] > 0)) continue;
      chosen = i;
      if (point < before + shared.mass[i]) {
        inside = (point - before) / shared.factor[i];
        break;
      }
      before += shared.mass[i];
    }
    const int begin = begin_of(chosen), end = begin_of(chosen + 1);
    const int each = (end - begin + kThreads - 1) / kThreads;
    const int64_t start = begin + static_cast<int64_t>(each) * threadIdx.x;
    const int first = start < end ? static_cast<int>(start) : end, stop = end - first < each ? end : first + each;
    double own = 0;
    for (int i = first; i < stop; ++i) own += weight(to_compute(load<1>(x + i).at[0]), i, chosen);
    double until = own;  // the weight of the segment's columns up to this thread's last one
    for (int by = 1; by < kWarp; by *= 2) {
      const double other = __shfl_up_sync(kAllLanes, until, by);
      if (lane() >= by) until += other;
    }
    if (lane() == kWarp - 1) shared.totals[warp()] = until;
    __syncthreads();
    double earlier = 0;
    for (int i = 0; i < warp(); ++i) earlier += shared.totals[i];
    until += earlier;
    const unsigned int some = __ballot_sync(kAllLanes, own > 0);
    const unsigned int beyond = __ballot_sync(kAllLanes, own > 0 && until > inside);
    if (lane() == 0) {
      shared.reached[warp()] = beyond != 0 ? __ffs(static_cast<int>(beyond)) - 1 : -1;
      shared.last[warp()] = some != 0 ? kWarp - 1 - __clz(static_cast<int>(some)) : -1;
    }
    __syncthreads();
    int thread = -1;  // the first whose sum is above the point, else the last that has a weight
    for (int i = 0; i < kWarps && thread < 0; ++i) {
      if (shared.reached[i] >= 0) thread = i * kWarp + shared.reached[i];
    }
    for (int i = kWarps - 1; i >= 0 && thread < 0; --i) {
      if (shared.last[i] >= 0) thread = i * kWarp + shared.last[i];
    }
    if (static_cast<int>(threadIdx.x) == thread) {
      double cumulative = until - own;
      int index = first;
      for (int i = first; i < stop; ++i) {
        const double mass = weight(to_compute(load<1>(x + i).at[0]), i, chosen);
        cumulative += mass;
        if (mass > 0) index = i;
        if (mass > 0 && cumulative > inside) break;
      }
      shared.index = index;
    }
    __syncthreads();
    const int index = shared.index;
    __syncthreads();  // all of `shared` may be written again
    return index;
  }

  // Sets filter.key to the largest key such that the passing logits with that key or a larger one weigh at least `target`.
  // Returns the weight of those with a larger key.
  template <typename F>
  __device__ double select(double target, const F& weight) {
    using Key = decltype(filter.key);
    Key found = 0;
    double above = 0;
    for (int shift = 8 * static_cast<int>(sizeof(Key)) - kDigit; shift >= 0; shift -= kDigit) {
      A own[kSteps] = {};
      each([&](A value, int index) {
        if (!passes(value, index)) return;
        const Key key = ordered_key(value);
        const A w = weight(value);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          if (key >= (found | static_cast<Key>(i + 1) << shift)) own[i] += w;
        }
      });
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const double all = warp_reduce(static_cast<double>(own[i]), [](double a, double b) { return a + b; });
        if (lane() == 0) shared.steps[warp()][i] = all;
      }
      __syncthreads();
      if (threadIdx.x < kSteps) {
        double all = 0;
        for (int i = 0; i < kWarps; ++i) all += shared.steps[i][threadIdx.x];
        shared.totals[threadIdx.x] = all;
      }
      __syncthreads();
      int digit = 0;
      while (digit < kSteps && shared.totals[digit] >= target) ++digit;
      if (digit < kSteps) above = shared.totals[digit];
      found |= static_cast<Key>(digit) << shift;
      __syncthreads();
    }
    // The sums here have another order than the target's, so no key may reach a target near the total. Never loosen an
    // earlier filter.
    filter.key = found > filter.key ? found : filter.key;
    filter.last = 0x7fffffff;
    return above;
  }

  __device__ __forceinline__ A mass_of(A value, double top) const {
    return exp2_of(maximum((value - static_cast<A>(top)) * scale, kLowest<A>));
  }

  __device__ void keep_top_k(int k) {
    select(k, [](A) { return A(1); });
    statistics();
  }

  __device__ void keep_top_p(double top_p) {
    const double target = top_p * sum, top = max;
    const Filter<A> before = filter;
    const double above = select(target, [&](A value) { return mass_of(value, top); });
    // Of the logits that equal the key, the first ones that the target needs pass, at least one.
    const A edge = number_of(filter.key);
    const double mass = mass_of(edge, top), wanted = mass > 0 ? ceil((target - above) / mass) : INFINITY;
    measure([&](A value, int index) { return before(value, index) && value == edge ? 1.0 : 0.0; });
    double ties = 0;
    for (int i = 0; i < kWarps; ++i) ties += shared.mass[i];
    if (wanted < ties) {
      filter.last = find((wanted > 1 ? wanted : 1) - 0.5, [&](A value, int, int) { return value == edge ? 1.0 : 0.0; });
    }
    __syncthreads();
    statistics();
  }

  __device__ int draw(double uniform, bool greedy) {
    if (greedy) {
      const A top = static_cast<A>(max);
      measure([&](A value, int) { return value == top ? 1.0 : 0.0; });
      return find(0.5, [&](A value, int, int) { return value == top ? 1.0 : 0.0; });
    }
    return find(uniform * sum, [&](A value, int index, int number) {
      return passes(value, index) ? static_cast<double>(mass_of(value, shared.max[number])) : 0.0;
    });
  }
};

template <typename T>
struct Arguments {
  const T* logits;
  int columns;
  int64_t stride;
  const double* draws;
  int64_t* tokens;
  Compute<T>* log_probs;
  Compute<T>* entropy;
  double inverse_temperature;
  int top_k;
  double top_p;
  bool greedy;
};

template <typename T, bool by_vector, bool filtered>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(Arguments<T> a) {
  using A = Compute<T>;
  static_assert(std::is_trivially_default_constructible_v<Shared>, "shared memory is not initialised");
  __shared__ Shared shared;
  const int64_t number = blockIdx.x;
  Row<T, by_vector, filtered> row(
      a.logits + number * a.stride, a.columns, static_cast<A>(kLog2E * a.inverse_temperature), shared);
  row.statistics();
  int token = a.columns - 1;
  double log_prob = NAN, entropy = NAN;
  if (row.sum > 0) {  // not so where a logit is NaN or +inf, or all are -inf
    if constexpr (filtered) {
      if (a.top_k > 0) row.keep_top_k(a.top_k);
      if (a.top_p < 1) row.keep_top_p(a.top_p);
    }
    const double logarithm = log(row.sum);
    token = row.draw(a.draws[number], a.greedy);
    log_prob = (static_cast<double>(to_compute(row.x[token])) - row.max) * a.inverse_temperature - logarithm;
    entropy = logarithm - row.weighted / row.sum / kLog2E;
  }
  if (threadIdx.x == 0) {
    a.tokens[number] = token;
    a.log_probs[number] = static_cast<A>(log_prob);
    a.entropy[number] = static_cast<A>(entropy);
  }
}

template <typename T>
cudaError_t launch_rows(
    const SampleArrays& s, double temperature, int64_t top_k, double top_p, cudaStream_t stream) {
  using A = Compute<T>;
  const double inverse = temperature == 0 ? 1 : 1 / temperature;
  const Arguments<T> arguments{
      static_cast<const T*>(s.logits), static_cast<int>(s.columns), s.stride, s.draws, s.tokens,
      static_cast<A*>(s.log_probs), static_cast<A*>(s.entropy), inverse,
      top_k < s.columns ? static_cast<int>(top_k) : 0, top_p, temperature == 0};
  const bool by_vector = aligned(s.logits) && s.stride * sizeof(T) % 16 == 0;
  const bool filtered = arguments.top_k > 0 || top_p < 1;
  auto* kernel = filtered ? (by_vector ? sample_kernel<T, true, true> : sample_kernel<T, false, true>)
                          : (by_vector ? sample_kernel<T, true, false> : sample_kernel<T, false, false>);
  return launch(kernel, {s.rows}, kThreads, 0, stream, arguments);
}

}  // namespace

cudaError_t launch_sample_tokens(
    const SampleArrays& arrays, double temperature, int64_t top_k, double top_p, cudaStream_t stream) {
  if (arrays.rows == 0) return cudaSuccess;
  switch (arrays.type) {
    case Element::kFloat: return launch_rows<float>(arrays, temperature, top_k, top_p, stream);
    case Element::kBfloat16: return launch_rows<__nv_bfloat16>(arrays, temperature, top_k, top_p, stream);
    case Element::kHalf: return launch_rows<__half>(arrays, temperature, top_k, top_p, stream);
    default: return launch_rows<double>(arrays, temperature, top_k, top_p, stream);
  }
}

}  // namespace rlhf_lightning
