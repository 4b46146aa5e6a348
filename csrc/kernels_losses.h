// Advantages and clipped losses, written once over Vec. Included by kernels_impl.h alone.

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
