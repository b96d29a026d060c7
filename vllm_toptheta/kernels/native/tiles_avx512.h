// The inner loops of decode attention (tiles_avx2.h) for CPUs with AVX-512.
//
// Only these functions may use it: the files that include them are compiled for AVX2, and callers are told whether the
// CPU has it. A score is the same chain of fused multiply-adds as there, so that both keep the same keys.
#pragma once

#include "tiles_avx2.h"

namespace topt {

constexpr int kMaxWideTileHeads = 8;

#define TOPT_AVX512 __attribute__((target("avx512f")))

// Thirty-two elements as two vectors, in any order that `unpermute` turns into the natural one; see Elem.
template <class T>
struct Wide;

template <>
struct Wide<bf16> {
  TOPT_AVX512 static TOPT_INLINE void load32(const bf16* p, __m512& a, __m512& b) {
    const __m512i x = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  TOPT_AVX512 static TOPT_INLINE void unpermute(__m512& a, __m512& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b);
    a = first;
  }
  // From the order of two times Elem<T>::load16 to this one, or back.
  TOPT_AVX512 static TOPT_INLINE void regroup(__m512& a, __m512& b) {
    const __m512 first = _mm512_shuffle_f32x4(a, b, 0x44);
    b = _mm512_shuffle_f32x4(a, b, 0xee);
    a = first;
  }
};

template <>
struct Wide<fp16> {
  TOPT_AVX512 static TOPT_INLINE void load32(const fp16* p, __m512& a, __m512& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  TOPT_AVX512 static TOPT_INLINE void unpermute(__m512&, __m512&) {}
  TOPT_AVX512 static TOPT_INLINE void regroup(__m512&, __m512&) {}
};

template <>
struct Wide<float> {
  TOPT_AVX512 static TOPT_INLINE void load32(const float* p, __m512& a, __m512& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  TOPT_AVX512 static TOPT_INLINE void unpermute(__m512&, __m512&) {}
  TOPT_AVX512 static TOPT_INLINE void regroup(__m512&, __m512&) {}
};

// acc += x * y; see `accumulate`.
TOPT_AVX512 TOPT_INLINE void accumulate_wide(__m512& acc, __m512 x, __m512 y) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
}

// `score_tile` for 32 * NP tokens.
template <class T, int GT, int NP, bool PREFETCH>
TOPT_AVX512 TOPT_INLINE const char* score_tile_avx512(const T* __restrict k, int k_stride, const float* __restrict q,
                                                      int num_dims, bool first, bool last, float* __restrict s,
                                                      int s_stride, const char* ahead) {
  __m512 acc[GT][2 * NP];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NP; i++)
      acc[g][i] = first ? _mm512_setzero_ps() : _mm512_load_ps(s + g * s_stride + 16 * i);
  constexpr int kLines = NP * 32 * sizeof(T) / 64;  // cache lines in a dimension
  for (int d = 0; d < num_dims; d++) {
    if (PREFETCH) {
      TOPT_UNROLL for (int i = 0; i < kLines; i++) prefetch(ahead + 64 * i);
      ahead += 64 * kLines;
    }
    __m512 x[2 * NP];
    TOPT_UNROLL for (int i = 0; i < NP; i++) Wide<T>::load32(k + 32 * i, x[2 * i], x[2 * i + 1]);
    TOPT_UNROLL for (int g = 0; g < GT; g++) {
      const __m512 qv = _mm512_set1_ps(q[g]);
      TOPT_UNROLL for (int i = 0; i < 2 * NP; i++) accumulate_wide(acc[g][i], x[i], qv);
    }
    k += k_stride;
    q += GT;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < NP; i++) {
    if (last) Wide<T>::unpermute(acc[g][2 * i], acc[g][2 * i + 1]);
    _mm512_store_ps(s + g * s_stride + 32 * i, acc[g][2 * i]);
    _mm512_store_ps(s + g * s_stride + 32 * i + 16, acc[g][2 * i + 1]);
  }
  return ahead;
}

// `score_chunk` for tokens [begin, end), multiples of 32.
template <class T, int GT, bool PREFETCH>
TOPT_TILE TOPT_AVX512 const char* score_chunk_avx512(const T* k, int k_stride, const float* q, int num_dims, bool first,
                                                     bool last, float* s, int s_stride, int begin, int end,
                                                     const char* ahead) {
  constexpr int NP = GT <= 2 ? 4 : GT <= 4 ? 2 : 1;  // at most 16 accumulators beside K
  int t = begin;
  for (; t + 32 * NP <= end; t += 32 * NP)
    ahead = score_tile_avx512<T, GT, NP, PREFETCH>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
  for (; t < end; t += 32)
    ahead = score_tile_avx512<T, GT, 1, PREFETCH>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
  return ahead;
}

// `value_tile` for 32 * NP columns; acc in the order of Wide<T>::load32.
template <class T, int GT, int NP, bool PREFETCH>
TOPT_AVX512 TOPT_INLINE const char* value_tile_avx512(const T* __restrict v, int head_dim, int num_rows,
                                                      const float* __restrict p, int p_stride, float* __restrict acc,
                                                      const char* ahead) {
  __m512 sum[GT][2 * NP];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NP; i++)
      sum[g][i] = _mm512_load_ps(acc + g * head_dim + 16 * i);
  constexpr int kLines = NP * 32 * sizeof(T) / 64;  // cache lines in a row
  for (int t = 0; t < num_rows; t++) {
    if (PREFETCH) {
      TOPT_UNROLL for (int i = 0; i < kLines; i++) prefetch(ahead + 64 * i);
      ahead += 64 * kLines;
    }
    __m512 x[2 * NP];
    TOPT_UNROLL for (int i = 0; i < NP; i++) Wide<T>::load32(v + 32 * i, x[2 * i], x[2 * i + 1]);
    TOPT_UNROLL for (int g = 0; g < GT; g++) {
      const __m512 pv = _mm512_set1_ps(p[g * p_stride]);
      TOPT_UNROLL for (int i = 0; i < 2 * NP; i++) accumulate_wide(sum[g][i], x[i], pv);
    }
    v += head_dim;
    p++;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NP; i++)
      _mm512_store_ps(acc + g * head_dim + 16 * i, sum[g][i]);
  return ahead;
}

// `value_chunk` for a head_dim that is a multiple of 32.
template <class T, int GT, bool PREFETCH>
TOPT_TILE TOPT_AVX512 const char* value_chunk_avx512(const T* v, int head_dim, int num_rows, const float* p,
                                                     int p_stride, float* acc, const char* ahead) {
  int c = 0;
  if constexpr (GT <= 4)
    for (; c + 64 <= head_dim; c += 64)
      ahead = value_tile_avx512<T, GT, 2, PREFETCH>(v + c, head_dim, num_rows, p, p_stride, acc + c, ahead);
  for (; c < head_dim; c += 32)
    ahead = value_tile_avx512<T, GT, 1, PREFETCH>(v + c, head_dim, num_rows, p, p_stride, acc + c, ahead);
  return ahead;
}

// `gather_tile` for 32 * NP columns. Rows alternate between two sums: one alone would wait for itself.
template <class T, int NP>
TOPT_AVX512 TOPT_INLINE void gather_tile_avx512(const T* __restrict v, const int32_t* __restrict offsets,
                                                const float* __restrict p, int num_rows, float* __restrict acc) {
  __m512 sum[2][2 * NP];
  TOPT_UNROLL for (int i = 0; i < 2 * NP; i++) {
    sum[0][i] = _mm512_load_ps(acc + 16 * i);
    sum[1][i] = _mm512_setzero_ps();
  }
  const auto add = [&](int r, __m512* into) TOPT_AVX512 __attribute__((always_inline)) {
    const __m512 pv = _mm512_set1_ps(p[r]);
    TOPT_UNROLL for (int i = 0; i < NP; i++) {
      __m512 x, y;
      Wide<T>::load32(v + offsets[r] + 32 * i, x, y);
      accumulate_wide(into[2 * i], x, pv);
      accumulate_wide(into[2 * i + 1], y, pv);
    }
  };
  int r = 0;
  for (; r + 2 <= num_rows; r += 2) {
    add(r, sum[0]);
    add(r + 1, sum[1]);
  }
  if (r < num_rows) add(r, sum[0]);
  TOPT_UNROLL for (int i = 0; i < 2 * NP; i++) _mm512_store_ps(acc + 16 * i, _mm512_add_ps(sum[0][i], sum[1][i]));
}

template <class T>
TOPT_TILE TOPT_AVX512 void gather_rows_avx512(const T* v, int head_dim, const int32_t* offsets, const float* p,
                                              int num_rows, float* acc) {
  int c = 0;
  for (; c + 128 <= head_dim; c += 128) gather_tile_avx512<T, 4>(v + c, offsets, p, num_rows, acc + c);
  for (; c + 64 <= head_dim; c += 64) gather_tile_avx512<T, 2>(v + c, offsets, p, num_rows, acc + c);
  for (; c < head_dim; c += 32) gather_tile_avx512<T, 1>(v + c, offsets, p, num_rows, acc + c);
}

// Turns a sum from the order of Wide<T>::load32 into the natural one.
template <class T>
TOPT_TILE TOPT_AVX512 void unpermute_row_avx512(float* row, int head_dim) {
  for (int d = 0; d < head_dim; d += 32) {
    __m512 x = _mm512_load_ps(row + d), y = _mm512_load_ps(row + d + 16);
    Wide<T>::unpermute(x, y);
    _mm512_store_ps(row + d, x);
    _mm512_store_ps(row + d + 16, y);
  }
}

// See `exp2_nonpositive`: the same steps on twice as many lanes.
TOPT_AVX512 TOPT_INLINE __m512 exp2_nonpositive_avx512(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_set1_ps(0.0013276471959519573f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009675541502617f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.055507132750658064f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.2402211972075171f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931469670628837f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

TOPT_AVX512 TOPT_INLINE __m256 upper_half(__m512 x) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}

// `exponentials` with AVX-512.
template <bool PRUNE, bool LOST>
TOPT_TILE TOPT_AVX512 float exponentials_avx512(float* __restrict s, int begin, int end, float max, float theta,
                                                uint64_t* __restrict kept, float* __restrict lost, const char* ahead) {
  const __m512 m = _mm512_set1_ps(max), limit = _mm512_set1_ps(theta);
  __m512 sum = _mm512_setzero_ps();
  for (int t = begin; t < end; t += 16) {
    prefetch(ahead);
    ahead += 64;
    const __m512 x = _mm512_load_ps(s + t), e = exp2_nonpositive_avx512(_mm512_sub_ps(x, m));
    sum = _mm512_add_ps(sum, e);
    if (!PRUNE) {
      _mm512_store_ps(s + t, e);
      continue;
    }
    const __mmask16 keeps = _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ);
    const uint16_t bits = keeps;
    std::memcpy(reinterpret_cast<char*>(kept) + t / 8, &bits, sizeof(bits));
    _mm512_store_ps(s + t, _mm512_maskz_mov_ps(keeps, e));
    if (!LOST) continue;
    const __m512 rest = _mm512_maskz_mov_ps(_mm512_knot(keeps), e);
    _mm256_store_ps(lost + t / 2, _mm256_add_ps(_mm512_castps512_ps256(rest), upper_half(rest)));
  }
  return horizontal_sum(_mm256_add_ps(_mm512_castps512_ps256(sum), upper_half(sum)));
}

// `exponentials` with the one or the other.
template <bool PRUNE, bool LOST>
TOPT_INLINE float exponentials_with(bool avx512, float* s, int begin, int end, float max, float theta, uint64_t* kept,
                                    float* lost, const char* ahead) {
  return (avx512 ? exponentials_avx512<PRUNE, LOST> : exponentials<PRUNE, LOST>)(s, begin, end, max, theta, kept, lost,
                                                                                ahead);
}

}  // namespace topt
