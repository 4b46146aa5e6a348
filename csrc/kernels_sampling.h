// Samples a token from a row of logits in three steps: the softmax statistics of the row's parts, the part that the draw falls
// in, the token in that part. Top-k and top-p first make a shorter row. For kernels_impl.h alone, after kernels_softmax.h.

inline int64_t part_size(int64_t begin, int64_t n) {
  return n - begin < kSamplePart ? n - begin : kSamplePart;
}

// Computes the statistics of every part, and returns those of the whole row.
template <typename T>
inline SoftmaxState part_statistics(const T* x, int64_t n, double inverse_temperature, SoftmaxState* parts) {
  SoftmaxState all;
  for (int64_t begin = 0, b = 0; begin < n; begin += kSamplePart, ++b) {
    parts[b] = SoftmaxState();
    softmax_statistics(x + begin, part_size(begin, n), inverse_temperature, parts[b]);
    all.max = parts[b].max > all.max ? parts[b].max : all.max;
  }
  for (int64_t begin = 0, b = 0; begin < n; begin += kSamplePart, ++b) {
    if (parts[b].sum == 0) continue;  // nothing but -inf
    const double shift = (parts[b].max - all.max) * inverse_temperature;
    const double factor = __builtin_exp(shift);
    all.sum += factor * parts[b].sum;
    all.weighted += factor * (parts[b].weighted + shift * parts[b].sum);
  }
  return all;
}

// out[i] = exp((x[i] - max) / temperature); out has room for whole vectors.
template <typename T, typename A>
inline void exponentials(const T* x, int64_t n, double max, double inverse_temperature, A* out) {
  using V = VecOf<T>;
  const V center = V::all(A(max)), inverse = V::all(A(inverse_temperature)), lowest = V::all(kLowest<A>);
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    exponential(maximum(lowest, (V::load(x + i) - center) * inverse)).store(out + i);
  }
  if (i < n) {
    const V value = load_partial<V>(x + i, n - i, negative_infinity<T>());
    store_partial(out + i, n - i, exponential(maximum(lowest, (value - center) * inverse)));
  }
}

template <typename T, typename A>
inline void widen_row(const T* x, int64_t n, A* out) {
  using V = VecOf<T>;
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::load(x + i).store(out + i);
  if (i < n) store_partial(out + i, n - i, load_partial<V>(x + i, n - i, negative_infinity<T>()));
}

// The token in one part of the row, x[0..n), n <= kSamplePart: the first whose cumulative mass is above `point`. Where rounding
// leaves the point above them all, the last that has a mass. If greedy, the first of the largest.
template <typename T>
inline int64_t token_in_part(const T* x, int64_t n, double max, const SampleOptions& options, double point) {
  using A = typename Accumulate<T>::type;
  A of[kSamplePart];
  if (options.greedy) {
    widen_row(x, n, of);
    int64_t i = 0;
    while (i < n - 1 && !(of[i] == max)) ++i;
    return i;
  }
  exponentials(x, n, max, options.inverse_temperature, of);
  double cumulative = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    cumulative += of[i];
    if (cumulative > point) return i;
    last = of[i] > 0 ? i : last;
  }
  return last;
}

template <typename T>
inline SampledToken draw_from(
    const T* x, int64_t n, const SampleOptions& options, double draw, const SoftmaxState& all,
    const SoftmaxState* parts) {
  if (!(all.sum > 0)) return {n - 1, __builtin_nan(""), __builtin_nan("")};  // a NaN or +inf, or nothing but -inf
  const double point = draw * all.sum;
  double before = 0, in_part = 0;
  int64_t chosen = 0, first = 0;
  for (int64_t begin = 0, b = 0; begin < n; begin += kSamplePart, ++b) {
    if (parts[b].sum == 0) continue;
    const double factor = __builtin_exp((parts[b].max - all.max) * options.inverse_temperature);
    const double mass = factor * parts[b].sum;
    if (mass == 0) continue;
    chosen = b, first = begin, in_part = __builtin_inf();  // the last part that has a mass, unless the loop finds the point
    if (options.greedy ? parts[b].max == all.max : point < before + mass) {
      in_part = (point - before) / factor;
      break;
    }
    before += mass;
  }
  const int64_t token =
      first + token_in_part(x + first, part_size(first, n), parts[chosen].max, options, in_part);
  typename Accumulate<T>::type value;
  widen_row(x + token, 1, &value);
  const double logarithm = __builtin_log(all.sum);
  return {token, (value - all.max) * options.inverse_temperature - logarithm, logarithm - all.weighted / all.sum};
}

inline uint32_t ordered_key(float x) {
  const uint32_t bits = float_to_bits(x + 0.0f);  // -0 is 0
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline uint64_t ordered_key(double x) {
  const double value = x + 0.0;
  uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  return bits ^ (bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63);
}

// What select() finds: in descending order, the first element at which the sum of the weights reaches the target.
template <typename Key>
struct Selected {
  Key key;
  double before;  // the weight of all larger elements
};

// Radix selection, 11 bits of the keys a pass. Where `weights` is null, each element weighs 1. Overwrites keys and weights.
template <typename Key, typename A>
inline Selected<Key> select(Key* keys, A* weights, int64_t n, double target) {
  constexpr int kDigit = 11, kValues = 1 << kDigit;
  double before = 0;
  double sums[kValues];
  for (int shift = 8 * int(sizeof(Key)) - kDigit;; shift = shift > kDigit ? shift - kDigit : 0) {
    for (double& sum : sums) sum = 0;
    for (int64_t i = 0; i < n; ++i) sums[(keys[i] >> shift) % kValues] += weights ? double(weights[i]) : 1.0;
    int chosen = -1;
    double above = before;
    for (int digit = kValues - 1; digit >= 0; --digit) {
      if (sums[digit] == 0) continue;
      before = above;
      chosen = digit;
      above += sums[digit];
      if (above >= target) break;
    }
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool same = int((keys[i] >> shift) % kValues) == chosen;
      keys[left] = keys[i];
      if (weights) weights[left] = weights[i];
      left += same;
    }
    n = left;
    if (shift == 0) return {keys[0], before};
  }
}

// Applies top-k and top-p: writes the tokens that pass to s.values and s.index, in the row's order, and returns their number.
template <typename T>
inline int64_t filter(
    const T* x, int64_t n, const SampleOptions& options, SoftmaxState all,
    const SampleScratch<typename Accumulate<T>::type>& s) {
  using A = typename Accumulate<T>::type;
  widen_row(x, n, s.values);
  for (int64_t i = 0; i < n; ++i) s.index[i] = int32_t(i);
  // Keeps the elements above the key, and the first `ties` of those that equal it.
  const auto keep = [&](typename OrderedKey<A>::type key, int64_t ties) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto own = ordered_key(s.values[i]);
      s.values[kept] = s.values[i];
      s.index[kept] = s.index[i];
      const bool tied = own == key && ties > 0;
      ties -= tied;
      kept += own > key || tied;
    }
    n = kept;
  };
  if (options.top_k > 0 && options.top_k < n) {
    for (int64_t i = 0; i < n; ++i) s.keys[i] = ordered_key(s.values[i]);
    keep(select(s.keys, static_cast<A*>(nullptr), n, double(options.top_k)).key, n);
    all = part_statistics(s.values, n, options.inverse_temperature, s.parts);
  }
  if (options.top_p < 1) {
    for (int64_t i = 0; i < n; ++i) s.keys[i] = ordered_key(s.values[i]);
    exponentials(s.values, n, all.max, options.inverse_temperature, s.masses);
    const double target = options.top_p * all.sum;
    const auto last = select(s.keys, s.masses, n, target);
    const double mass = s.masses[0];  // select() leaves equal elements alone, so the first stands for each
    int64_t ties = 1;
    while (ties < n && last.before + double(ties) * mass < target) ++ties;
    keep(last.key, ties);
  }
  return n;
}

template <typename T>
SampledToken sample_row(
    const T* x, int64_t n, const SampleOptions& options, double draw,
    const SampleScratch<typename Accumulate<T>::type>& scratch) {
  const SoftmaxState all = part_statistics(x, n, options.inverse_temperature, scratch.parts);
  const bool filtered = options.top_k > 0 || options.top_p < 1;
  if (!filtered || !(all.sum > 0)) return draw_from(x, n, options, draw, all, scratch.parts);
  const int64_t kept = filter(x, n, options, all, scratch);
  const SoftmaxState rest = part_statistics(scratch.values, kept, options.inverse_temperature, scratch.parts);
  SampledToken result = draw_from(scratch.values, kept, options, draw, rest, scratch.parts);
  result.token = scratch.index[result.token];
  return result;
}
