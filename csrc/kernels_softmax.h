// Softmax statistics and gradients of a row, for any Vec. For kernels_impl.h alone.

constexpr int64_t kBlock = 2048;  // elements; a block is read twice, the second time from the L1 cache

// exp of a log-probability below this is 0, as of -inf, but this can be multiplied by 0.
template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-800) : A(-200);

// The same bound for differences of logits; finite at every temperature that check.h allows.
template <typename A>
inline A lowest_difference(double inverse_temperature) {
  return A(kLowest<A> / inverse_temperature);
}

template <typename T>
using VecOf = Vec<typename Accumulate<T>::type>;

template <typename V, typename A>
inline A sum_lanes(V v) {
  A lanes[V::lanes];
  v.store(lanes);
  A sum = 0;
  for (int64_t i = 0; i < V::lanes; ++i) sum += lanes[i];
  return sum;
}

template <typename T>
inline T negative_infinity() {
  return T(-__builtin_inf());
}
template <>
inline Bfloat16 negative_infinity() {
  return {0xff80};
}
template <>
inline Float16 negative_infinity() {
  return {0xfc00};
}

// The largest of x[0..n). It may pass over a NaN, which the sum then carries.
template <typename T>
inline typename Accumulate<T>::type block_maximum(const T* x, int64_t n) {
  using A = typename Accumulate<T>::type;
  using V = VecOf<T>;
  V best[4] = {V::all(A(-__builtin_inf())), V::all(A(-__builtin_inf())), V::all(A(-__builtin_inf())),
               V::all(A(-__builtin_inf()))};
  int64_t i = 0;
  for (; i + 4 * V::lanes <= n; i += 4 * V::lanes) {
    for (int k = 0; k < 4; ++k) best[k] = maximum(V::load(x + i + k * V::lanes), best[k]);
  }
  for (; i < n; i += V::lanes) {
    best[0] = maximum(load_partial<V>(x + i, n - i < V::lanes ? n - i : V::lanes, negative_infinity<T>()), best[0]);
  }
  A lanes[V::lanes];
  maximum(maximum(best[0], best[1]), maximum(best[2], best[3])).store(lanes);
  A max = lanes[0];
  for (int64_t k = 1; k < V::lanes; ++k) max = lanes[k] > max ? lanes[k] : max;
  return max;
}

template <typename T>
void softmax_statistics(const T* x, int64_t size, double inverse_temperature, SoftmaxState& state) {
  using A = typename Accumulate<T>::type;
  using V = VecOf<T>;
  const Exponential<A> exponential_of(inverse_temperature);
  const V lowest = V::all(lowest_difference<A>(inverse_temperature));
  for (; size > 0; x += kBlock, size -= kBlock) {
    const int64_t n = size < kBlock ? size : kBlock;
    const double max = block_maximum(x, n);
    if (max > state.max) {
      if (state.sum > 0) {
        double shift = (state.max - max) * inverse_temperature;
        shift = shift < -1e4 ? -1e4 : shift;
        const double factor = __builtin_exp(shift);
        state.weighted = factor * (state.weighted + shift * state.sum);
        state.sum *= factor;
      }
      state.max = max;
    }
    // While all elements are -inf, 0 replaces the maximum, so that the terms are 0 and not NaN.
    const V center = V::all(A(state.max == -__builtin_inf() ? 0 : state.max));
    V sum[2] = {V::all(0), V::all(0)};
    V weighted[2] = {V::all(0), V::all(0)};
    const auto add = [&](V value, int k) {
      const V d = maximum(lowest, value - center);  // keeps a NaN
      const V e = exponential_of(d);
      sum[k] = sum[k] + e;
      weighted[k] = multiply_add(e, d, weighted[k]);
    };
    int64_t i = 0;
    for (; i + 2 * V::lanes <= n; i += 2 * V::lanes) {
      // The next block's maximum would wait for memory; this loop does not. A prefetch past the row's end does no harm.
      __builtin_prefetch(x + i + kBlock);
      if (2 * V::lanes * sizeof(T) > 64) __builtin_prefetch(x + i + kBlock + V::lanes);
      add(V::load(x + i), 0);
      add(V::load(x + i + V::lanes), 1);
    }
    for (; i < n; i += V::lanes) {
      add(load_partial<V>(x + i, n - i < V::lanes ? n - i : V::lanes, negative_infinity<T>()), 0);
    }
    state.sum += sum_lanes<V, A>(sum[0] + sum[1]);
    state.weighted += sum_lanes<V, A>(weighted[0] + weighted[1]) * inverse_temperature;
  }
}

// out = (grad_log_prob * ([token] - p) - grad_entropy * p * (log p + entropy)) / temperature, with
// p = exp(d / temperature) / sum, log p = d / temperature - log_sum, and d = x - shift.
template <typename T>
void softmax_gradient(const T* x, int64_t n, const RowGradient& row, bool streaming, T* out) {
  using A = typename Accumulate<T>::type;
  using V = VecOf<T>;
  const Exponential<A> exponential_of(row.inverse_temperature);
  const V shift = V::all(A(row.shift));
  const V lowest = V::all(lowest_difference<A>(row.inverse_temperature));
  const double factor = -__builtin_exp(-row.log_sum) * row.inverse_temperature;
  const V slope = V::all(A(factor * row.grad_entropy * row.inverse_temperature));
  const V offset = V::all(A(factor * (row.grad_log_prob + row.grad_entropy * (row.entropy - row.log_sum))));
  const auto gradient = [&](V value) {
    const V d = maximum(lowest, value - shift);
    return exponential_of(d) * multiply_add(slope, d, offset);
  };
  const bool has_token = row.token >= 0 && row.token < n;
  // Computed before the row is overwritten, with 1 - p in the form that keeps its digits.
  A at_token = 0;
  if (has_token) {
    A value[V::lanes];
    load_partial<V>(x + row.token, 1, negative_infinity<T>()).store(value);
    double log_p = (double(value[0]) - row.shift) * row.inverse_temperature - row.log_sum;
    log_p = log_p < kLowest<A> ? kLowest<A> : log_p;
    at_token = A((-row.grad_log_prob * __builtin_expm1(log_p) -
                  row.grad_entropy * __builtin_exp(log_p) * (log_p + row.entropy)) *
                 row.inverse_temperature);
  }
  const auto partial = [&](int64_t i, int64_t count) {
    store_partial(out + i, count, gradient(load_partial<V>(x + i, count, negative_infinity<T>())));
  };
  constexpr int64_t kAhead = 2048 / sizeof(T);  // elements to prefetch ahead, harmless past the row's end
  int64_t i = 0;
  if (streaming) {
    constexpr int64_t kBytes = V::lanes * sizeof(T);
    const int64_t over = reinterpret_cast<uintptr_t>(out) % kBytes;
    i = over == 0 ? 0 : (kBytes - over) / int64_t(sizeof(T));
    i = i < n ? i : n;
    if (i > 0) partial(0, i);
    for (; i + V::lanes <= n; i += V::lanes) {
      __builtin_prefetch(x + i + kAhead);
      gradient(V::load(x + i)).stream(out + i);
    }
    streaming_fence();
  } else {
    for (; i + V::lanes <= n; i += V::lanes) {
      __builtin_prefetch(x + i + kAhead);
      gradient(V::load(x + i)).store(out + i);
    }
  }
  if (i < n) partial(i, n - i);
  if (has_token) store_partial(out + row.token, 1, V::all(at_token));
}
