// Vectors of numbers: Vec<float> in the instruction set of the including file, and Vec<double> with a single lane. For
// kernels_impl.h alone, inside its namespace. maximum(a, b) is b if either is NaN, as in the x86 instruction. stream() is a
// streaming store, to an address that is a multiple of the vector's size; a fence must follow the last one.

template <typename T>
struct Vec;

// Loads the last, partial vector of a row through a small buffer, padded with `fill`.
template <typename V, typename T>
inline V load_partial(const T* x, int64_t n, T fill) {
  T buffer[V::lanes];
  for (int64_t i = 0; i < V::lanes; ++i) buffer[i] = i < n ? x[i] : fill;
  return V::load(buffer);
}
template <typename V, typename T>
inline void store_partial(T* x, int64_t n, V v) {
  T buffer[V::lanes];
  v.store(buffer);
  for (int64_t i = 0; i < n; ++i) x[i] = buffer[i];
}

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline void streaming_fence() {
#if defined(KERNELS_AVX512) || defined(KERNELS_AVX2)
  _mm_sfence();
#endif
}

#if defined(KERNELS_AVX512)

template <>
struct Vec<float> {
  static constexpr int64_t lanes = 16;
  __m512 v;
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Vec load(const Bfloat16* x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const Float16* x) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
  }
  __m256i narrow(const Bfloat16*) const {
#ifdef KERNELS_BF16
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);  // rounding could carry a NaN into an infinity
    up = _mm512_mask_set1_epi32(up, nan, 0x7fc0);
    return _mm512_cvtepi32_epi16(up);
#endif
  }
  __m256i narrow(const Float16*) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  void store(float* x) const { _mm512_storeu_ps(x, v); }
  void stream(float* x) const { _mm512_stream_ps(x, v); }
  template <typename T>
  void store(T* x) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(x)); }
  template <typename T>
  void stream(T* x) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(x), narrow(x)); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> round(Vec<float> a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// p * 2^n with n a whole number
inline Vec<float> scale(Vec<float> p, Vec<float> n) { return {_mm512_scalef_ps(p.v, n.v)}; }

#elif defined(KERNELS_AVX2)

template <>
struct Vec<float> {
  static constexpr int64_t lanes = 8;
  __m256 v;
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* x) { return {_mm256_loadu_ps(x)}; }
  static Vec load(const Bfloat16* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const Float16* x) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))}; }
  __m128i narrow(const Bfloat16*) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0b1000);
    return _mm256_castsi256_si128(packed);
  }
  __m128i narrow(const Float16*) const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  void store(float* x) const { _mm256_storeu_ps(x, v); }
  void stream(float* x) const { _mm256_stream_ps(x, v); }
  template <typename T>
  void store(T* x) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(x), narrow(x)); }
  template <typename T>
  void stream(T* x) const { _mm_stream_si128(reinterpret_cast<__m128i*>(x), narrow(x)); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> round(Vec<float> a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec<float> scale(Vec<float> p, Vec<float> n) {
  // The exponent field holds n + 127; below -126 the result is taken as 0.
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  const __m256 tiny = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(tiny, _mm256_mul_ps(p.v, _mm256_castsi256_ps(power)))};
}

#else  // plain loops over eight lanes, for the compiler to vectorise

inline float widen(float x) { return x; }
inline float widen(Bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A float with the half's fields has an exponent 112 too small. Multiplying by 2^112 corrects it, for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}
inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, Bfloat16& out) {
  const uint32_t bits = float_to_bits(value);
  out.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float value, Float16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const float size = bits_to_float(bits & 0x7fffffff);
  if (value != value) {
    out.bits = sign | 0x7e00;
  } else if (size >= 65520.0f) {  // half way from the largest half to the next power of two
    out.bits = sign | 0x7c00;
  } else if (size < 0x1p-14f) {  // subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the lowest bits
    out.bits = sign | uint16_t(float_to_bits(size + 0.5f) - float_to_bits(0.5f));
  } else {
    const uint32_t odd = (bits >> 13) & 1;
    out.bits = sign | uint16_t(((bits & 0x7fffffff) - 0x38000000 + 0xfff + odd) >> 13);
  }
}

template <>
struct Vec<float> {
  static constexpr int64_t lanes = 8;
  float v[8];
  template <typename F>
  static Vec each(F f) {
    Vec out;
    for (int i = 0; i < 8; ++i) out.v[i] = f(i);
    return out;
  }
  static Vec all(float x) {
    return each([&](int) { return x; });
  }
  template <typename T>
  static Vec load(const T* x) {
    return each([&](int i) { return widen(x[i]); });
  }
  template <typename T>
  void store(T* x) const {
    for (int i = 0; i < 8; ++i) narrow(v[i], x[i]);
  }
  template <typename T>
  void stream(T* x) const { store(x); }
};
inline Vec<float> operator+(Vec<float> a, Vec<float> b) {
  return Vec<float>::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec<float> operator-(Vec<float> a, Vec<float> b) {
  return Vec<float>::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec<float> operator*(Vec<float> a, Vec<float> b) {
  return Vec<float>::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return Vec<float>::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
inline Vec<float> round(Vec<float> a) {  // to the nearest integer, for |a| < 2^22: the sum has no bits for a fraction
  return Vec<float>::each([&](int i) { return (a.v[i] + 0x1.8p23f) - 0x1.8p23f; });
}
inline Vec<float> scale(Vec<float> p, Vec<float> n) {
  return Vec<float>::each([&](int i) {
    if (n.v[i] != n.v[i]) return n.v[i];
    return n.v[i] < -126.0f ? 0.0f : p.v[i] * bits_to_float(uint32_t(int32_t(n.v[i]) + 127) << 23);
  });
}

#endif

template <>
struct Vec<double> {
  static constexpr int64_t lanes = 1;
  double v;
  static Vec all(double x) { return {x}; }
  static Vec load(const double* x) { return {*x}; }
  void store(double* x) const { *x = v; }
  void stream(double* x) const { *x = v; }
};
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return {a.v + b.v}; }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return {a.v - b.v}; }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return {a.v * b.v}; }
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return {a.v * b.v + c.v}; }

// exp(x) for x <= 88, about 1 unit in the last place; 0 far below, NaN for NaN.
inline Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  // exp(x) = 2^n exp(r) with |r| <= log(2)/2; log(2) in two parts, the first short enough that its product is exact.
  x = maximum(V::all(-200.0f), x);
  const V n = round(x * V::all(1.44269504f));
  const V r = multiply_add(n, V::all(-0x1.7f7d1cp-20f), multiply_add(n, V::all(-0x1.62e4p-1f), x));
  // (exp(r) - 1 - r) / r^2, fitted at Chebyshev nodes: relative error of exp(r) 3e-10
  V p = multiply_add(r, V::all(1.98992878e-4f), V::all(1.39336525e-3f));
  p = multiply_add(p, r, V::all(8.33329847e-3f));
  p = multiply_add(p, r, V::all(4.16664649e-2f));
  p = multiply_add(p, r, V::all(1.66666667e-1f));
  p = multiply_add(p, r, V::all(5.00000001e-1f));
  p = multiply_add(p * r, r, r) + V::all(1.0f);
  return scale(p, n);
}
inline Vec<double> exponential(Vec<double> x) { return {__builtin_exp(x.v)}; }

// exp(rate * d) for rate * d from kLowest to 88: d is a difference of logits, rate the inverse temperature.
template <typename A>
struct Exponential {
  Vec<A> rate;
  explicit Exponential(double inverse_temperature) : rate(Vec<A>::all(A(inverse_temperature))) {}
  Vec<A> operator()(Vec<A> d) const { return exponential(d * rate); }
};

#ifdef KERNELS_AVX512
// A third fewer instructions, and an error of at most 1 unit in the last place: exp(rate d) = 2^(k/16) 2^r, where k is an
// integer, |r| <= 1/32, and rate / log(2) comes in two parts. Adding 1.5 * 2^19 leaves k in the lowest bits of the sum. The
// last four bits choose among 2^(0/16) ... 2^(15/16); scalef takes the integer part of k/16.
template <>
struct Exponential<float> {
  __m512 high, low, table;
  explicit Exponential(double inverse_temperature) {
    const double rate = inverse_temperature * 1.4426950408889634;
    high = _mm512_set1_ps(float(rate));
    low = _mm512_set1_ps(float(rate - float(rate)));
    table = _mm512_setr_ps(
        0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f, 0x1.3dea64p0f, 0x1.4bfdaep0f, 0x1.5ab07ep0f,
        0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f, 0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f,
        0x1.ea4afap0f);
  }
  Vec<float> operator()(Vec<float> d) const {
    const __m512 magic = _mm512_set1_ps(0x1.8p19f);
    const __m512 sum = _mm512_fmadd_ps(d.v, high, magic);
    const __m512 k = _mm512_sub_ps(sum, magic);
    const __m512 r = _mm512_fmadd_ps(d.v, low, _mm512_fmsub_ps(d.v, high, k));
    const __m512 t = _mm512_permutexvar_ps(_mm512_castps_si512(sum), table);
    // (2^r - 1) / r, fitted at Chebyshev nodes: relative error of 2^r 2.3e-9
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0555054108f), _mm512_set1_ps(0.240233552f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69314718f));
    return {_mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(t, r), p, t), k)};
  }
};
#endif
