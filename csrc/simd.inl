// Vectors of WPLFAST_VECTOR_BYTES bytes: loads that widen to the compute type and stores that round to the storage
// type. Pointers need no more than element alignment. Included by for_each_isa.inl.

typedef float F32 __attribute__((vector_size(WPLFAST_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(WPLFAST_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(WPLFAST_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 2)));
typedef float LooseF32 __attribute__((vector_size(WPLFAST_VECTOR_BYTES), aligned(4), may_alias));
typedef double LooseF64 __attribute__((vector_size(WPLFAST_VECTOR_BYTES), aligned(8), may_alias));
typedef uint16_t LooseU16 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class C>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <class C>
using Vector = typename VectorOf<C>::type;

template <class C>
constexpr int64_t lanes = WPLFAST_VECTOR_BYTES / sizeof(C);

WPLFAST_INLINE F32 load(const float* from) { return *reinterpret_cast<const LooseF32*>(from); }

WPLFAST_INLINE F64 load(const double* from) { return *reinterpret_cast<const LooseF64*>(from); }

WPLFAST_INLINE F32 load(const BFloat16* from) {
  return (F32)(__builtin_convertvector(*reinterpret_cast<const LooseU16*>(from), U32) << 16);
}

WPLFAST_INLINE F32 load(const Half* from) {
#if defined(WPLFAST_AVX512)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(WPLFAST_AVX2)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  F32 value;
  for (int lane = 0; lane < lanes<float>; ++lane) value[lane] = to_float(from[lane]);
  return value;
#endif
}

WPLFAST_INLINE void store(float* to, F32 value) { *reinterpret_cast<LooseF32*>(to) = value; }

WPLFAST_INLINE void store(double* to, F64 value) { *reinterpret_cast<LooseF64*>(to) = value; }

WPLFAST_INLINE void store(BFloat16* to, F32 value) {
  const U32 bits = (U32)value;
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U32 is_nan = (U32)(value != value);                        // rounding could carry a NaN into infinity
  *reinterpret_cast<LooseU16*>(to) = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), U16);
}

WPLFAST_INLINE void store(Half* to, F32 value) {
#if defined(WPLFAST_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(WPLFAST_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < lanes<float>; ++lane) to[lane] = to_half(value[lane]);
#endif
}

// The first `count` (fewer than a vector's) elements at `from`, and zeros; nothing beyond them is read.
template <class T>
WPLFAST_INLINE auto load_first(const T* from, int64_t count) {
  alignas(64) T first[WPLFAST_VECTOR_BYTES / (sizeof(T) == 8 ? 8 : 4)] = {};
#if defined(WPLFAST_AVX512)
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 8) {
    return (F64)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  } else if constexpr (sizeof(T) == 4) {
    return (F32)_mm512_maskz_loadu_ps(mask, from);
  } else {
    _mm256_store_si256(reinterpret_cast<__m256i*>(first), _mm256_maskz_loadu_epi16(mask, from));
    return load(first);  // the compiler sees through the array
  }
#else
  std::memcpy(first, from, count * sizeof(T));
  return load(first);
#endif
}

// Stores the first `count` (fewer than a vector's) elements; nothing beyond them is written.
template <class C>
WPLFAST_INLINE void store_first(C* to, Vector<C> value, int64_t count) {
#if defined(WPLFAST_AVX512)
  if constexpr (sizeof(C) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)value);
  } else {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
  }
  return;
#endif
  alignas(64) C first[lanes<C>];
  store(first, value);
  std::memcpy(to, first, count * sizeof(C));
}

// Store that bypasses the caches where the machine can (`to` must be aligned to the vector), for data that is larger
// than they are: an ordinary store would first read the line that it overwrites.
template <class T, class V>
WPLFAST_INLINE void store_streaming(T* to, V value) {
#if defined(WPLFAST_AVX512)
  if constexpr (sizeof(T) >= 4) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
    return;
  }
#elif defined(WPLFAST_AVX2)
  if constexpr (sizeof(T) >= 4) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
    return;
  }
#endif
  store(to, value);
}

// Streaming stores are ordered by no lock or barrier: a fence must precede the hand-over to other threads.
WPLFAST_INLINE void fence_streaming() {
#if defined(WPLFAST_AVX512) || defined(WPLFAST_AVX2)
  _mm_sfence();
#endif
}

// Sum of all lanes in double, in lane order.
template <class V>
WPLFAST_INLINE double sum_lanes(V value) {
  double sum = 0;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(value[0]); ++lane) sum += static_cast<double>(value[lane]);
  return sum;
}
