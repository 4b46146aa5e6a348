// GAE and the clipped losses, for any Vec. For kernels_impl.h alone.

constexpr int64_t kSteps = 16;  // steps of a GAE tile: one cache line of float32 in every row

// One tile of GAE: up to as many rows as a vector has lanes, and `n` steps from `begin` on. It reads the tile row by row,
// transposes it in registers, computes the last step first, transposes the results and writes them. A masked slot goes through
// the arithmetic too, and its result is not chosen.
template <bool kWhole, bool kStreaming, typename T>
inline __attribute__((always_inline)) void gae_tile(
    const GaeRows<T>& g, int64_t first, int64_t begin, int64_t n, Vec<T>& next_value, Vec<T>& next_advantage) {
  using V = Vec<T>;
  constexpr int64_t kParts = kSteps / V::lanes;  // the square parts of a tile, for transpose()
  const V gamma = V::all(g.gamma), gamma_lambda = V::all(g.gamma_lambda);
  const int64_t rows = g.rows - first < V::lanes ? g.rows - first : V::lanes;
  V rewards[kSteps], values[kSteps], kept[kSteps];
  uint32_t bits[V::lanes];
  const auto load = [&](const T* x, int64_t from) {
    if (kWhole || n - from >= V::lanes) return V::load(x + from);
    return load_partial<V>(x + from, n - from, T(0));
  };
  const auto store = [&](T* x, int64_t from, V v) {
    if (kStreaming) return v.stream(x + from);
    if (kWhole || n - from >= V::lanes) return v.store(x + from);
    store_partial(x + from, n - from, v);
  };
  for (int64_t lane = 0; lane < V::lanes; ++lane) {
    const int64_t i = (first + (lane < rows ? lane : 0)) * g.stride + begin;
    bits[lane] = kWhole ? true_bits(g.mask + i) : true_bits(g.mask + i, n);
    for (int64_t from = 0; from < kSteps; from += V::lanes) {
      rewards[from + lane] = load(g.rewards + i, from);
      kept[from + lane] = values[from + lane] = load(g.values + i, from);
    }
  }
  for (int64_t part = 0; part < kParts; ++part) transpose(rewards + part * V::lanes);
  for (int64_t part = 0; part < kParts; ++part) transpose(values + part * V::lanes);
  const auto counted = LaneBits<T>::load(bits);
#pragma GCC unroll 16
  for (int64_t step = kSteps - 1; step >= 0; --step) {  // steps past the end are not counted
    const auto real = counted.at(step);
    const V delta = (rewards[step] + gamma * next_value) - values[step];
    const V advantage = delta + gamma_lambda * next_advantage;
    next_value = choose(real, values[step], next_value);
    next_advantage = choose(real, advantage, next_advantage);
    rewards[step] = next_advantage;  // the inputs are no longer needed: reuse their place for the outputs
  }
  if (g.advantages == nullptr) return;
  for (int64_t part = 0; part < kParts; ++part) transpose(rewards + part * V::lanes);
  for (int64_t lane = 0; lane < rows; ++lane) {
    const int64_t i = (first + lane) * g.stride + begin;
    for (int64_t from = 0; from < kSteps; from += V::lanes) {
      const auto real = Mask<T>::low_bits(bits[lane] >> from);
      const V advantage = rewards[from + lane];
      store(g.advantages + i, from, choose(real, advantage, V::all(0)));
      store(g.returns + i, from, choose(real, advantage + kept[from + lane], V::all(0)));
    }
  }
}

// The hardware prefetcher cannot follow so many rows, each read one cache line at a time. So each tile prefetches one row's
// part of the next kLanes tiles.
template <typename T>
inline void fetch_ahead(const GaeRows<T>& g, int64_t first, int64_t begin) {
  constexpr int64_t kLanes = Vec<T>::lanes, kStretch = kLanes * kSteps;
  const int64_t row = first + begin / kSteps % kLanes;
  if (begin < kStretch || row >= g.rows) return;
  const int64_t from = row * g.stride + (begin / kStretch - 1) * kStretch;
  for (int64_t i = from; i < from + kStretch; i += 64 / int64_t(sizeof(T))) {
    __builtin_prefetch(g.rewards + i, 0, 2);
    __builtin_prefetch(g.values + i, 0, 2);
  }
  for (int64_t i = from; i < from + kStretch; i += 64) __builtin_prefetch(g.mask + i, 0, 2);
}

// Whether every whole tile's part of a row is aligned for streaming stores.
template <typename T>
inline bool can_stream(const GaeRows<T>& g) {
  constexpr int64_t kBytes = Vec<T>::lanes * sizeof(T);
  const auto begin = reinterpret_cast<uintptr_t>(g.advantages) | reinterpret_cast<uintptr_t>(g.returns);
  return g.streaming && (begin | g.stride * sizeof(T)) % kBytes == 0;
}

// The recursion runs along a row, so the lanes of a vector take one row each.
template <typename T>
void gae_rows(const GaeRows<T>& g) {
  using V = Vec<T>;
  const bool streaming = can_stream(g);
  for (int64_t first = 0; first < g.rows; first += V::lanes) {
    const int64_t rows = g.rows - first < V::lanes ? g.rows - first : V::lanes;
    V next_value = V::all(0), next_advantage = V::all(0);
    if (g.next_value != nullptr) {
      next_value = load_partial<V>(g.next_value + first, rows, T(0));
      next_advantage = load_partial<V>(g.next_advantage + first, rows, T(0));
    }
    int64_t begin = g.steps / kSteps * kSteps;
    if (begin < g.steps) gae_tile<false, false>(g, first, begin, g.steps - begin, next_value, next_advantage);
    while (begin > 0) {
      begin -= kSteps;
      fetch_ahead(g, first, begin);
      if (streaming) {
        gae_tile<true, true>(g, first, begin, kSteps, next_value, next_advantage);
      } else {
        gae_tile<true, false>(g, first, begin, kSteps, next_value, next_advantage);
      }
    }
    if (g.next_value != nullptr) {
      store_partial(g.next_value + first, rows, next_value);
      store_partial(g.next_advantage + first, rows, next_advantage);
    }
  }
  if (streaming) streaming_fence();
}

// One vector of elements from `i` on, or the last n < V::lanes of them.
template <typename V, typename T>
inline V load_some(const T* x, int64_t i, int64_t n) {
  return n >= V::lanes ? V::load(x + i) : load_partial<V>(x + i, n, T());
}
template <typename V, typename T>
inline void store_some(T* x, int64_t i, int64_t n, V v) {
  if (n >= V::lanes) return v.store(x + i);
  store_partial(x + i, n, v);
}
template <typename T>
inline void store_some(bool* x, int64_t i, int64_t n, Mask<T> m) {
  if (n >= Vec<T>::lanes) return m.store(x + i);
  bool buffer[16];
  m.store(buffer);
  for (int64_t k = 0; k < n; ++k) x[i + k] = buffer[k];
}

template <typename T>
void policy_loss(const PolicyLoss<T>& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const V low = V::all(p.low), high = V::all(p.high), dual_clip = V::all(p.dual_clip);
  const V zero = V::all(0), least = V::all(-20), most = V::all(20);
  const auto some = [&](int64_t i, int64_t n) {
    const V log_ratio = load_some<V>(p.log_probs, i, n) - load_some<V>(p.old_log_probs, i, n);
    const V ratio = exponential(minimum(most, maximum(least, log_ratio)));  // keeps a NaN
    const V negated = V::all(-1) * load_some<V>(p.advantages, i, n);
    const V surrogate = negated * ratio;
    const V bounded = negated * minimum(high, maximum(low, ratio));
    const auto clipped = bounded > surrogate;
    const V loss = choose(clipped, bounded, surrogate);
    const V bound = dual_clip * negated;
    const auto dual = (negated > zero) & (loss > bound);
    const auto far = (least > log_ratio) | (log_ratio > most);
    store_some(p.loss, i, n, choose(dual, bound, loss));
    store_some<T>(p.clipped, i, n, clipped);
    store_some(p.slope, i, n, choose(clipped | dual | far, zero, surrogate));
  };
  for (; begin + V::lanes <= end; begin += V::lanes) some(begin, V::lanes);
  if (begin < end) some(begin, end - begin);
}

template <typename T>
void value_loss(const ValueLoss<T>& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const V half = V::all(T(0.5)), clip = V::all(p.clip), minus_clip = V::all(-p.clip);
  const auto some = [&](int64_t i, int64_t n) {
    const V values = load_some<V>(p.values, i, n), old_values = load_some<V>(p.old_values, i, n);
    const V returns = load_some<V>(p.returns, i, n);
    const V error = values - returns;
    const V loss = half * (error * error);
    const V moved = values - old_values;
    const V bounded_error = (old_values + minimum(clip, maximum(minus_clip, moved))) - returns;
    const V bounded_loss = half * (bounded_error * bounded_error);
    const auto clipped = ((moved > clip) | (minus_clip > moved)) & (bounded_loss > loss);
    store_some(p.loss, i, n, choose(clipped, bounded_loss, loss));
    store_some<T>(p.clipped, i, n, clipped);
    store_some(p.slope, i, n, choose(clipped, V::all(0), error));
  };
  for (; begin + V::lanes <= end; begin += V::lanes) some(begin, V::lanes);
  if (begin < end) some(begin, end - begin);
}

template <typename T, typename Out>
void loss_gradient(const LossGradient<T>& g, int64_t begin, int64_t end) {
  using V = Vec<T>;
  Out* out = static_cast<Out*>(g.out);
  const auto some = [&](int64_t i, int64_t n) {
    const V grad = g.same_grad ? V::all(*g.grad) : load_some<V>(g.grad, i, n);
    store_some(out, i, n, grad * load_some<V>(g.slope, i, n));
  };
  for (; begin + V::lanes <= end; begin += V::lanes) some(begin, V::lanes);
  if (begin < end) some(begin, end - begin);
}
