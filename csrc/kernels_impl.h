// The kernels of kernels.h, written once over Vec. Included by the kernels_*.cpp files, each in its own namespace.

constexpr int64_t kBlock = 2048;  // elements: a block is read twice, the second time from the first-level cache

// Log-probabilities below this are as good as -inf (exp gives 0) but can be multiplied by 0.
template <typename A>
constexpr A kLowest = sizeof(A) == 8 ? A(-800) : A(-200);

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

// The largest of x[0..n); NaN may be passed over, the sum will see it.
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
  const V inverse = V::all(A(inverse_temperature));
  const V lowest = V::all(kLowest<A>);
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
    // While all is -inf, 0 stands in for the maximum: the terms are then 0 and not NaN.
    const V center = V::all(A(state.max == -__builtin_inf() ? 0 : state.max));
    V sum[2] = {V::all(0), V::all(0)};
    V weighted[2] = {V::all(0), V::all(0)};
    const auto add = [&](V value, int k) {
      const V d = maximum(lowest, (value - center) * inverse);  // a NaN stays
      const V e = exponential(d);
      sum[k] = sum[k] + e;
      weighted[k] = multiply_add(e, d, weighted[k]);
    };
    int64_t i = 0;
    for (; i + 2 * V::lanes <= n; i += 2 * V::lanes) {
      add(V::load(x + i), 0);
      add(V::load(x + i + V::lanes), 1);
    }
    for (; i < n; i += V::lanes) {
      add(load_partial<V>(x + i, n - i < V::lanes ? n - i : V::lanes, negative_infinity<T>()), 0);
    }
    state.sum += sum_lanes<V, A>(sum[0] + sum[1]);
    state.weighted += sum_lanes<V, A>(weighted[0] + weighted[1]);
  }
}

// out = (grad_log_prob * ([token] - p) - grad_entropy * p * (log p + entropy)) / temperature
template <typename T>
void softmax_gradient(const T* x, int64_t n, const RowGradient& row, T* out) {
  using A = typename Accumulate<T>::type;
  using V = VecOf<T>;
  const V inverse = V::all(A(row.inverse_temperature));
  const V shift = V::all(A(row.shift));
  const V log_sum = V::all(A(row.log_sum));
  const V lowest = V::all(kLowest<A>);
  const V slope = V::all(A(-row.grad_entropy * row.inverse_temperature));
  const V offset = V::all(A(-(row.grad_log_prob + row.grad_entropy * row.entropy) * row.inverse_temperature));
  const auto gradient = [&](V value) {
    const V log_p = maximum(lowest, (value - shift) * inverse - log_sum);
    return exponential(log_p) * multiply_add(slope, log_p, offset);
  };
  const bool has_token = row.token >= 0 && row.token < n;
  // Before the row is overwritten, and with 1 - p taken where it keeps its digits.
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
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) gradient(V::load(x + i)).store(out + i);
  if (i < n) store_partial(out + i, n - i, gradient(load_partial<V>(x + i, n - i, negative_infinity<T>())));
  if (has_token) store_partial(out + row.token, 1, V::all(at_token));
}

// The recursion runs along a row, so sixteen rows run side by side, on a transposed tile of 32 steps.
template <typename T>
void gae_rows(const GaeRows<T>& g) {
  constexpr int64_t kRows = 16, kSteps = 32;
  T rewards[kSteps][kRows], values[kSteps][kRows], counted[kSteps][kRows];
  for (int64_t first = 0; first < g.rows; first += kRows) {
    const int64_t rows = g.rows - first < kRows ? g.rows - first : kRows;
    T next_value[kRows] = {}, next_advantage[kRows] = {};
    for (int64_t end = g.steps; end > 0; end -= kSteps) {
      const int64_t begin = end > kSteps ? end - kSteps : 0;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t lane = 0; lane < kRows; ++lane) {
          const int64_t i = (first + lane) * g.steps + t;
          const bool real = lane < rows && g.mask[i];
          rewards[t - begin][lane] = real ? g.rewards[i] : T(0);
          values[t - begin][lane] = real ? g.values[i] : T(0);
          counted[t - begin][lane] = real ? T(1) : T(0);
        }
      }
      for (int64_t s = end - begin - 1; s >= 0; --s) {
        for (int64_t lane = 0; lane < kRows; ++lane) {
          const bool real = counted[s][lane] != T(0);
          const T value = values[s][lane];
          const T delta = (rewards[s][lane] + g.gamma * next_value[lane]) - value;
          const T advantage = delta + g.gamma_lambda * next_advantage[lane];
          next_value[lane] = real ? value : next_value[lane];
          next_advantage[lane] = real ? advantage : next_advantage[lane];
          rewards[s][lane] = real ? advantage : T(0);  // the tile's inputs are spent: it takes the outputs
          values[s][lane] = real ? advantage + value : T(0);
        }
      }
      for (int64_t lane = 0; lane < rows; ++lane) {
        for (int64_t t = begin; t < end; ++t) {
          g.advantages[(first + lane) * g.steps + t] = rewards[t - begin][lane];
          g.returns[(first + lane) * g.steps + t] = values[t - begin][lane];
        }
      }
    }
  }
}

template <typename T>
void policy_loss(const PolicyLoss<T>& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t kSize = 256;
  T log_ratio[kSize], ratio[kSize];
  for (; begin < end; begin += kSize) {
    const int64_t n = end - begin < kSize ? end - begin : kSize;
    for (int64_t i = 0; i < n; ++i) log_ratio[i] = p.log_probs[begin + i] - p.old_log_probs[begin + i];
    for (int64_t i = n; i % V::lanes != 0; ++i) log_ratio[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T above = log_ratio[i] < T(-20) ? T(-20) : log_ratio[i];
      ratio[i] = above > T(20) ? T(20) : above;
    }
    for (int64_t i = n; i % V::lanes != 0; ++i) ratio[i] = 0;
    for (int64_t i = 0; i < n; i += V::lanes) exponential(V::load(ratio + i)).store(ratio + i);
    for (int64_t i = 0; i < n; ++i) {
      const T negated = -p.advantages[begin + i];
      const T r = ratio[i];
      const T above = r < p.low ? p.low : r;
      const T surrogate = negated * r;
      const T bounded = negated * (above > p.high ? p.high : above);
      const bool clipped = bounded > surrogate;
      const T loss = clipped ? bounded : surrogate;
      const T bound = p.dual_clip * negated;
      const bool dual = negated > 0 && loss > bound;
      const bool far = log_ratio[i] < T(-20) || log_ratio[i] > T(20);
      p.loss[begin + i] = dual ? bound : loss;
      p.clipped[begin + i] = clipped;
      p.slope[begin + i] = clipped || dual || far ? T(0) : surrogate;
    }
  }
}

template <typename T>
void value_loss(const ValueLoss<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T error = p.values[i] - p.returns[i];
    const T loss = T(0.5) * (error * error);
    const T moved = p.values[i] - p.old_values[i];
    const T above = moved < -p.clip ? -p.clip : moved;
    const T bounded_error = (p.old_values[i] + (above > p.clip ? p.clip : above)) - p.returns[i];
    const T bounded_loss = T(0.5) * (bounded_error * bounded_error);
    const bool clipped = (moved > p.clip || moved < -p.clip) && bounded_loss > loss;
    p.loss[i] = clipped ? bounded_loss : loss;
    p.clipped[i] = clipped;
    p.slope[i] = clipped ? T(0) : error;
  }
}

Kernels table(const char* name) {
  return {name,
          {softmax_statistics<float>, softmax_gradient<float>},
          {softmax_statistics<Bfloat16>, softmax_gradient<Bfloat16>},
          {softmax_statistics<Float16>, softmax_gradient<Float16>},
          {softmax_statistics<double>, softmax_gradient<double>},
          {gae_rows<float>, policy_loss<float>, value_loss<float>},
          {gae_rows<double>, policy_loss<double>, value_loss<double>}};
}
