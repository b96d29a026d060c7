// The inner loops of decode attention (tiles_avx2.h) for CPUs with AVX-512.
//
// Only these functions may use it: the files that include them are compiled for AVX2, and callers are told whether the
// CPU has it. A score is the same chain of fused multiply-adds as there, so that both keep the same keys.
#pragma once

#include "tiles_avx2.h"

namespace topt {

constexpr int kMaxWideTileHeads = 8;

#ifdef TOPT_EMULATE_AVX512  // by functions of the same names, for tests on CPUs without it
#define TOPT_AVX512
#else
#define TOPT_AVX512 __attribute__((target("avx512f")))
#endif

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
struct Wide<tiled_bf16> {
  TOPT_AVX512 static TOPT_INLINE __m512 load16(const tiled_bf16* p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  }
  TOPT_AVX512 static TOPT_INLINE void load32(const tiled_bf16* p, __m512& a, __m512& b) {
    a = load16(p);
    b = load16(p + 16);
  }
  TOPT_AVX512 static TOPT_INLINE void unpermute(__m512&, __m512&) {}
  TOPT_AVX512 static TOPT_INLINE __m512 first(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
  TOPT_AVX512 static TOPT_INLINE __m512 second(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
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
#ifdef TOPT_EMULATE_AVX512
  acc = _mm512_fmadd_ps(x, y, acc);
#else
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
#endif
}

// `score_tile` for 32 * NP tokens.
template <class T, int GT, int NP, class Lines>
TOPT_AVX512 TOPT_INLINE void score_tile_avx512(const T* __restrict k, int k_stride, const float* __restrict q,
                                               int num_dims, bool first, bool last, float* __restrict s,
                                               int s_stride, Lines& ahead) {
  __m512 acc[GT][2 * NP];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NP; i++)
      acc[g][i] = first ? _mm512_setzero_ps() : _mm512_load_ps(s + g * s_stride + 16 * i);
  constexpr int kLines = NP * 32 * sizeof(T) / 64;  // cache lines in a dimension
  for (int d = 0; d < num_dims; d++) {
    ahead.fetch(kLines);
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
}

// `score_chunk` for tokens [begin, end), multiples of 32.
template <class T, int GT, class Lines>
TOPT_TILE TOPT_AVX512 void score_chunk_avx512(const T* k, int k_stride, const float* q, int num_dims, bool first,
                                              bool last, float* s, int s_stride, int begin, int end, Lines ahead) {
  constexpr int NP = GT <= 2 ? 4 : GT <= 4 ? 2 : 1;  // at most 16 accumulators beside K
  int t = begin;
  for (; t + 32 * NP <= end; t += 32 * NP)
    score_tile_avx512<T, GT, NP>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
  for (; t < end; t += 32)
    score_tile_avx512<T, GT, 1>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
}

template <class T>
TOPT_AVX512 TOPT_INLINE void load32(const T* row, int column, __m512& a, __m512& b) {
  Wide<T>::load32(row + column, a, b);
}

// `value_tile` for 32 * NP columns; acc in the order of Wide<T>::load32.
template <class T, int GT, int NP, class Rows, class Lines>
TOPT_AVX512 TOPT_INLINE void value_tile_avx512(Rows rows, int column, int head_dim, int num_rows,
                                               const RowWeights& weights, float* __restrict acc, Lines& ahead) {
  __m512 sum[GT][2 * NP];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NP; i++)
      sum[g][i] = _mm512_setzero_ps();
  constexpr int kLines = Rows::template lines<T>(NP * 32);  // in a row
  const float* p = weights.p;
  const int p_stride = weights.p_stride;
  for (int r = 0; r < num_rows; r++) {
    ahead.fetch(kLines);
    const auto row = rows(r);
    __m512 x[2 * NP];
    TOPT_UNROLL for (int i = 0; i < NP; i++) load32(row, column + 32 * i, x[2 * i], x[2 * i + 1]);
    TOPT_UNROLL for (int g = 0; g < GT; g++) {
      const __m512 pv = _mm512_set1_ps(p[g * p_stride]);
      TOPT_UNROLL for (int i = 0; i < 2 * NP; i++) accumulate_wide(sum[g][i], x[i], pv);
    }
    p++;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) {
    const __m512 factor = _mm512_set1_ps(weights.factor[g * weights.factor_stride]);
    float* to = acc + g * head_dim;
    TOPT_UNROLL for (int i = 0; i < 2 * NP; i++)
        _mm512_store_ps(to + 16 * i, _mm512_fmadd_ps(factor, sum[g][i], _mm512_load_ps(to + 16 * i)));
  }
}

// `value_chunk` for a head_dim that is a multiple of 32.
template <class T, int GT, class Rows, class Lines>
TOPT_TILE TOPT_AVX512 void value_chunk_avx512(Rows rows, int head_dim, int num_rows, RowWeights weights, float* acc,
                                              Lines ahead) {
  int c = 0;
  if constexpr (GT == 1)
    for (; c + 128 <= head_dim; c += 128)
      value_tile_avx512<T, GT, 4>(rows, c, head_dim, num_rows, weights, acc + c, ahead);
  if constexpr (GT <= 4)
    for (; c + 64 <= head_dim; c += 64)
      value_tile_avx512<T, GT, 2>(rows, c, head_dim, num_rows, weights, acc + c, ahead);
  for (; c < head_dim; c += 32)
    value_tile_avx512<T, GT, 1>(rows, c, head_dim, num_rows, weights, acc + c, ahead);
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

// `group_exponentials` with AVX-512.
template <int SIZE>
TOPT_TILE TOPT_AVX512 void group_exponentials_avx512(float* __restrict s, int num_groups, float* __restrict max,
                                                     float* __restrict sum, LineStream ahead) {
  alignas(32) float lanes[64] = {};
  for (int i = 0; i < num_groups; i += 8, s += 8 * SIZE) {
    const int n = std::min(8, num_groups - i);
    for (int j = 0; j < n; j++) {
      __m512 a = _mm512_load_ps(s + j * SIZE);
      TOPT_UNROLL for (int t = 16; t < SIZE; t += 16) a = _mm512_max_ps(a, _mm512_load_ps(s + j * SIZE + t));
      _mm256_store_ps(lanes + 8 * j, _mm256_max_ps(_mm512_castps512_ps256(a), upper_half(a)));
    }
    _mm256_store_ps(max + i, transposed_maxima(lanes));
    for (int j = 0; j < n; j++) {
      const __m512 m = _mm512_set1_ps(max[i + j]);
      __m512 total = _mm512_setzero_ps();
      TOPT_UNROLL for (int t = j * SIZE; t < (j + 1) * SIZE; t += 16) {
        ahead.fetch(2);
        const __m512 e = exp2_nonpositive_avx512(_mm512_sub_ps(_mm512_load_ps(s + t), m));
        _mm512_store_ps(s + t, e);
        total = _mm512_add_ps(total, e);
      }
      _mm256_store_ps(lanes + 8 * j, _mm256_add_ps(_mm512_castps512_ps256(total), upper_half(total)));
    }
    _mm256_store_ps(sum + i, transposed_sums(lanes));
  }
}

}  // namespace topt
