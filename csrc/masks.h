// Masks over the lanes of a Vec, and the transpose of a tile: what kernels_losses.h needs beyond arithmetic. For kernels_impl.h
// alone, inside its namespace.
//
// Mask<T>: one bool for each lane of Vec<T>. LaneBits<T>: sixteen bits for each lane, the mask of sixteen steps of a row.
// transpose(tile): a square of lanes x lanes numbers; swaps lane j of tile[i] with lane i of tile[j].

template <typename T>
struct Mask;
template <typename T>
struct LaneBits;

inline uint32_t true_bits(const bool* x, int64_t n) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= uint32_t(x[i]) << i;
  return bits;
}

#if defined(KERNELS_AVX512)

// Bit i is x[i].
inline uint32_t true_bits(const bool* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm_test_epi8_mask(bytes, bytes);
}

template <>
struct Mask<float> {
  __mmask16 m;
  static Mask low_bits(uint32_t bits) { return {__mmask16(bits)}; }
  void store(bool* x) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm_maskz_set1_epi8(m, 1)); }
};
inline Mask<float> operator&(Mask<float> a, Mask<float> b) { return {_kand_mask16(a.m, b.m)}; }
inline Mask<float> operator|(Mask<float> a, Mask<float> b) { return {_kor_mask16(a.m, b.m)}; }
inline Mask<float> operator>(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline Vec<float> choose(Mask<float> m, Vec<float> a, Vec<float> b) { return {_mm512_mask_mov_ps(b.v, m.m, a.v)}; }
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }

template <>
struct LaneBits<float> {
  __m512i bits;
  static LaneBits load(const uint32_t* x) { return {_mm512_loadu_si512(x)}; }
  Mask<float> at(int64_t step) const { return {_mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << step))}; }
};

inline void transpose(Vec<float>* tile) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(tile[i].v, tile[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(tile[i].v, tile[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // b[i + k]: column k of each 4 x 4 block of rows i .. i + 3
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int k = 0; k < 4; ++k) {
    const __m512 even0 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88), odd0 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
    tile[k].v = _mm512_shuffle_f32x4(even0, even1, 0x88);
    tile[4 + k].v = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    tile[8 + k].v = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    tile[12 + k].v = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}

#elif defined(KERNELS_AVX2)

inline uint32_t true_bits(const bool* x) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return 0xffff ^ uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())));
}

template <>
struct Mask<float> {
  __m256 m;
  static Mask low_bits(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lane);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane))};
  }
  void store(bool* x) const {
    const __m256i words = _mm256_castps_si256(m);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i bytes = _mm_and_si128(_mm_packs_epi16(halves, halves), _mm_set1_epi8(1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(x), bytes);
  }
};
inline Mask<float> operator&(Mask<float> a, Mask<float> b) { return {_mm256_and_ps(a.m, b.m)}; }
inline Mask<float> operator|(Mask<float> a, Mask<float> b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Mask<float> operator>(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Vec<float> choose(Mask<float> m, Vec<float> a, Vec<float> b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }

template <>
struct LaneBits<float> {
  __m256i bits;
  static LaneBits load(const uint32_t* x) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))}; }
  Mask<float> at(int64_t step) const {
    const __m256i bit = _mm256_set1_epi32(1 << step);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit))};
  }
};

inline void transpose(Vec<float>* tile) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(tile[i].v, tile[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(tile[i].v, tile[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int k = 0; k < 4; ++k) {
    tile[k].v = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
    tile[4 + k].v = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
  }
}

#else

inline uint32_t true_bits(const bool* x) { return true_bits(x, 16); }

template <>
struct Mask<float> {
  bool m[8];
  template <typename F>
  static Mask each(F f) {
    Mask out;
    for (int i = 0; i < 8; ++i) out.m[i] = f(i);
    return out;
  }
  static Mask low_bits(uint32_t bits) {
    return each([&](int i) { return (bits >> i & 1) != 0; });
  }
  void store(bool* x) const {
    for (int i = 0; i < 8; ++i) x[i] = m[i];
  }
};
inline Mask<float> operator&(Mask<float> a, Mask<float> b) {
  return Mask<float>::each([&](int i) { return a.m[i] && b.m[i]; });
}
inline Mask<float> operator|(Mask<float> a, Mask<float> b) {
  return Mask<float>::each([&](int i) { return a.m[i] || b.m[i]; });
}
inline Mask<float> operator>(Vec<float> a, Vec<float> b) {
  return Mask<float>::each([&](int i) { return a.v[i] > b.v[i]; });
}
inline Vec<float> choose(Mask<float> m, Vec<float> a, Vec<float> b) {
  return Vec<float>::each([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
}
inline Vec<float> minimum(Vec<float> a, Vec<float> b) {
  return Vec<float>::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}

template <>
struct LaneBits<float> {
  uint32_t bits[8];
  static LaneBits load(const uint32_t* x) {
    LaneBits out;
    for (int i = 0; i < 8; ++i) out.bits[i] = x[i];
    return out;
  }
  Mask<float> at(int64_t step) const {
    return Mask<float>::each([&](int i) { return (bits[i] >> step & 1) != 0; });
  }
};

inline void transpose(Vec<float>* tile) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = tile[i].v[j];
      tile[i].v[j] = tile[j].v[i];
      tile[j].v[i] = kept;
    }
  }
}

#endif

template <>
struct Mask<double> {
  bool m;
  static Mask low_bits(uint32_t bits) { return {(bits & 1) != 0}; }
  void store(bool* x) const { *x = m; }
};
inline Mask<double> operator&(Mask<double> a, Mask<double> b) { return {a.m && b.m}; }
inline Mask<double> operator|(Mask<double> a, Mask<double> b) { return {a.m || b.m}; }
inline Mask<double> operator>(Vec<double> a, Vec<double> b) { return {a.v > b.v}; }
inline Vec<double> choose(Mask<double> m, Vec<double> a, Vec<double> b) { return m.m ? a : b; }
inline Vec<double> minimum(Vec<double> a, Vec<double> b) { return {a.v < b.v ? a.v : b.v}; }

template <>
struct LaneBits<double> {
  uint32_t bits;
  static LaneBits load(const uint32_t* x) { return {*x}; }
  Mask<double> at(int64_t step) const { return {(bits >> step & 1) != 0}; }
};
inline void transpose(Vec<double>*) {}
