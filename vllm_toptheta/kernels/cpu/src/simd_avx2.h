// AVX2 building blocks: cache dtype to float and back, exp2, tanh, reductions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "args.h"

namespace topt {

#define TOPT_TILE static __attribute__((noinline))
#define TOPT_INLINE inline __attribute__((always_inline))
#define TOPT_UNROLL _Pragma("GCC unroll 16")

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// bf16 in a cache whose pages lie in AMX tiles (layout.py); queries, outputs and means lie as ever.
struct tiled_bf16 {
  uint16_t bits;
};
template <class T>
constexpr bool kTiled = false;
template <>
constexpr bool kTiled<tiled_bf16> = true;

// Sixteen elements as two vectors. `load16` may return them in any order that `unpermute` turns into the natural one:
// for bf16 that saves the shuffles in the inner loops, which then run once per tile or once per output row.
template <class T>
struct Elem;

template <>
struct Elem<bf16> {
  static TOPT_INLINE void load16(const bf16* p, __m256& a, __m256& b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static TOPT_INLINE void unpermute(__m256& a, __m256& b) {
    const __m256 lo = _mm256_unpacklo_ps(a, b), hi = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(lo, hi, 0x20);
    b = _mm256_permute2f128_ps(lo, hi, 0x31);
  }
  static TOPT_INLINE __m256i round8(__m256 x) {  // to nearest even; a NaN stays a NaN
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r =
        _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), is_nan);
  }
  static TOPT_INLINE void store16(bf16* p, __m256 a, __m256 b) {
    const __m256i packed = _mm256_packus_epi32(round8(a), round8(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
};

template <>
struct Elem<fp16> {
  static TOPT_INLINE void load16(const fp16* p, __m256& a, __m256& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  static TOPT_INLINE void unpermute(__m256&, __m256&) {}
  static TOPT_INLINE void store16(fp16* p, __m256 a, __m256 b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Elem<tiled_bf16> {  // in natural order, as the tiles of the cache give it
  static TOPT_INLINE __m256 load8(const tiled_bf16* p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  }
  static TOPT_INLINE void load16(const tiled_bf16* p, __m256& a, __m256& b) {
    a = load8(p);
    b = load8(p + 8);
  }
  static TOPT_INLINE void unpermute(__m256&, __m256&) {}
  static TOPT_INLINE void store16(tiled_bf16* p, __m256 a, __m256 b) {
    Elem<bf16>::store16(reinterpret_cast<bf16*>(p), a, b);
  }
  // Eight pairs of elements: the first ones, or the second ones.
  static TOPT_INLINE __m256 first(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
  static TOPT_INLINE __m256 second(__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

template <>
struct Elem<float> {
  static TOPT_INLINE void load16(const float* p, __m256& a, __m256& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  static TOPT_INLINE void unpermute(__m256&, __m256&) {}
  static TOPT_INLINE void store16(float* p, __m256 a, __m256 b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
};

// `load16` for tiles without a register to spare.
template <class T>
TOPT_INLINE void load16_tight(const T* p, __m256& a, __m256& b) {
  Elem<T>::load16(p, a, b);
}

alignas(32) constexpr uint32_t kHighHalves[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                                 0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};

template <>
TOPT_INLINE void load16_tight(const bf16* p, __m256& a, __m256& b) {
  __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  asm("vpand %1, %0, %0" : "+x"(x) : "m"(kHighHalves));  // the mask stays in memory
  b = _mm256_castsi256_ps(x);
}

template <class T>
TOPT_INLINE void load16_natural(const T* p, __m256& a, __m256& b) {
  Elem<T>::load16(p, a, b);
  Elem<T>::unpermute(a, b);
}

// 2^x for x <= 0, relative error below 2e-7; what is below 2^-126 becomes 2^-126.
TOPT_INLINE __m256 exp2_nonpositive(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);  // in this order a NaN stays a NaN
  const __m256 magic = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const __m256 shifted = _mm256_add_ps(x, magic);
  const __m256 r = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
  __m256 p = _mm256_set1_ps(0.0013276471959519573f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.009675541502617f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.055507132750658064f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.2402211972075171f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.6931469670628837f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

// tanh as a rational function (the coefficients that Eigen uses for float), a few ulp.
TOPT_INLINE __m256 tanh8(__m256 x) {
  const __m256 limit = _mm256_set1_ps(7.90531110763549805f);
  x = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, x));
  const __m256 x2 = _mm256_mul_ps(x, x);
  __m256 p = _mm256_set1_ps(-2.76076847742355e-16f);
  p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(2.00018790482477e-13f));
  p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(-8.60467152213735e-11f));
  p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(5.12229709037114e-08f));
  p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(1.48572235717979e-05f));
  p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(6.37261928875436e-04f));
  p = _mm256_fmadd_ps(p, x2, _mm256_set1_ps(4.89352455891786e-03f));
  __m256 q = _mm256_set1_ps(1.19825839466702e-06f);
  q = _mm256_fmadd_ps(q, x2, _mm256_set1_ps(1.18534705686654e-04f));
  q = _mm256_fmadd_ps(q, x2, _mm256_set1_ps(2.26843463243900e-03f));
  q = _mm256_fmadd_ps(q, x2, _mm256_set1_ps(4.89352518554385e-03f));
  return _mm256_div_ps(_mm256_mul_ps(x, p), q);
}

TOPT_INLINE float horizontal_max(__m256 v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  a = _mm_max_ss(a, _mm_movehdup_ps(a));
  return _mm_cvtss_f32(a);
}

TOPT_INLINE float horizontal_sum(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  a = _mm_add_ss(a, _mm_movehdup_ps(a));
  return _mm_cvtss_f32(a);
}

// Eight maxima of eight vectors at once.
TOPT_INLINE __m256 transposed_maxima(const float* rows) {
  const auto pair = [rows](int i) {
    const __m256 a = _mm256_load_ps(rows + 16 * i), b = _mm256_load_ps(rows + 16 * i + 8);
    return _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  };
  const auto four = [pair](int i) {
    const __m256 a = pair(i), b = pair(i + 1);
    return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  };
  const __m256 a = four(0), b = four(2);
  return _mm256_max_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// The eight lowest bits as masks of eight lanes.
TOPT_INLINE __m256 lanes_of(uint64_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit));
}

// One bit a lane of four masks.
TOPT_INLINE uint32_t bits_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b));
  const __m256i cd = _mm256_packs_epi32(_mm256_castps_si256(c), _mm256_castps_si256(d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return static_cast<uint32_t>(
      _mm256_movemask_epi8(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order)));
}

// Eight sums of eight vectors at once.
TOPT_INLINE __m256 transposed_sums(const float* rows) {
  const auto pair = [rows](int i) {
    return _mm256_hadd_ps(_mm256_load_ps(rows + 16 * i), _mm256_load_ps(rows + 16 * i + 8));
  };
  const __m256 a = _mm256_hadd_ps(pair(0), pair(1)), b = _mm256_hadd_ps(pair(2), pair(3));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

TOPT_INLINE void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }

// Cache lines to prefetch: none, consecutive ones, a list, or a stream that is read much later.
struct NoLines {
  TOPT_INLINE void fetch(int) {}
};
struct LineRun {
  const char* next;
  TOPT_INLINE void fetch(int n) {
    TOPT_UNROLL for (int i = 0; i < n; i++) prefetch(next + 64 * i);
    next += 64 * n;
  }
};
struct LineList {
  const char* const* next;
  TOPT_INLINE void fetch(int n) {
    TOPT_UNROLL for (int i = 0; i < n; i++) prefetch(next[i]);
    next += n;
  }
};
struct LineStream {
  const char* next;
  bool near;  // into L1, where that holds it (48 KiB: 1.1x on Zen 5); else into L2, which has more lines under way
  TOPT_INLINE void fetch_at(size_t byte) const {
    if (near)
      _mm_prefetch(next + byte, _MM_HINT_T0);
    else
      _mm_prefetch(next + byte, _MM_HINT_T1);
  }
  TOPT_INLINE void fetch(int n) {
    TOPT_UNROLL for (int i = 0; i < n; i++) fetch_at(64 * i);
    next += 64 * n;
  }
};

}  // namespace topt
