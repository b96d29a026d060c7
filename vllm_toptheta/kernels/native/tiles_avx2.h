// The inner loops of decode attention on one page: scores, softmax, and weighted sums of V rows.
//
// Every loop over tiles is a function that is not inlined: inlined into the driver GCC spills the accumulators.
// A score is one chain of fused multiply-adds over the dimensions in ascending order, whatever the tile, so that
// scores, and with them the kept set, do not depend on how the work is cut.
#pragma once

#include <algorithm>

#include "simd_avx2.h"

namespace topt {

constexpr int kMaxTileHeads = 4;
constexpr int kChunkBytes = 8192;  // what one pass over a page part touches: stays in L1 beside its successor

// acc += x * y. As an intrinsic GCC 12 lets the product's register become the accumulator, and then spills.
TOPT_INLINE void accumulate(__m256& acc, __m256 x, __m256 y) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(x), "x"(y));
}

// Keeps GCC from moving loads ahead: with twelve accumulators there are no registers for them.
TOPT_INLINE void keep_order() { asm volatile("" ::: "memory"); }

// Adds q.k of `num_dims` dimensions to the scores of 16 * NT tokens and GT heads.
// k: [num_dims][k_stride]; q: [num_dims][GT]; s: [GT][s_stride]. Returns the advanced prefetch pointer.
template <class T, int GT, int NT, bool PREFETCH>
TOPT_INLINE const char* score_tile(const T* __restrict k, int k_stride, const float* __restrict q, int num_dims,
                                 bool first, bool last, float* __restrict s, int s_stride, const char* ahead) {
  __m256 acc[GT][2 * NT];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NT; i++)
      acc[g][i] = first ? _mm256_setzero_ps() : _mm256_load_ps(s + g * s_stride + 8 * i);
  constexpr bool kTight = GT * NT > 4;
  constexpr int kLines = NT * 16 * sizeof(T) * 2 / 64;  // cache lines in two dimensions
  for (int d = 0; d < num_dims; d += 2) {
    if (PREFETCH) {
      TOPT_UNROLL for (int i = 0; i < kLines; i++) prefetch(ahead + 64 * i);
      ahead += 64 * kLines;
    }
    TOPT_UNROLL for (int u = 0; u < 2; u++) {
      TOPT_UNROLL for (int i = 0; i < NT; i++) {
        __m256 x, y;
        if (kTight)
          load16_tight(k + 16 * i, x, y);
        else
          Elem<T>::load16(k + 16 * i, x, y);
        TOPT_UNROLL for (int g = 0; g < GT; g++) {
          const __m256 qv = _mm256_broadcast_ss(q + g);
          accumulate(acc[g][2 * i], x, qv);
          accumulate(acc[g][2 * i + 1], y, qv);
        }
        if (kTight) keep_order();
      }
      k += k_stride;
      q += GT;
    }
  }
  if (last) {
    TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < NT; i++)
        Elem<T>::unpermute(acc[g][2 * i], acc[g][2 * i + 1]);
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NT; i++)
      _mm256_store_ps(s + g * s_stride + 8 * i, acc[g][i]);
  return ahead;
}

// Scores of tokens [begin, end), multiples of 16, over one chunk of dimensions.
template <class T, int GT, bool PREFETCH>
TOPT_TILE const char* score_chunk(const T* k, int k_stride, const float* q, int num_dims, bool first, bool last,
                                  float* s, int s_stride, int begin, int end, const char* ahead) {
  constexpr int NT = GT == 1 ? 4 : GT == 4 ? 1 : 2;  // enough independent chains to fill the FMA pipes
  int t = begin;
  for (; t + 16 * NT <= end; t += 16 * NT)
    ahead = score_tile<T, GT, NT, PREFETCH>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
  for (; t < end; t += 16)
    ahead = score_tile<T, GT, 1, PREFETCH>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
  return ahead;
}

// Adds the p-weighted sum of V rows to 16 * NC columns of the accumulators of GT heads.
// v: [num_rows][head_dim]; p: [GT][p_stride]; acc: [GT][head_dim], in the order of Elem<T>::load16.
template <class T, int GT, int NC, bool PREFETCH>
TOPT_INLINE const char* value_tile(const T* __restrict v, int head_dim, int num_rows, const float* __restrict p,
                                 int p_stride, float* __restrict acc, const char* ahead) {
  __m256 sum[GT][2 * NC];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NC; i++)
      sum[g][i] = _mm256_load_ps(acc + g * head_dim + 8 * i);
  constexpr bool kTight = GT * NC > 4;
  constexpr int kLines = NC * 16 * sizeof(T) * 2 / 64;  // cache lines in two rows
  for (int t = 0; t < num_rows; t++) {
    if (PREFETCH && !(t & 1)) {
      TOPT_UNROLL for (int i = 0; i < kLines; i++) prefetch(ahead + 64 * i);
      ahead += 64 * kLines;
    }
    TOPT_UNROLL for (int i = 0; i < NC; i++) {
      __m256 x, y;
      Elem<T>::load16(v + 16 * i, x, y);
      TOPT_UNROLL for (int g = 0; g < GT; g++) {
        const __m256 pv = _mm256_broadcast_ss(p + g * p_stride);
        accumulate(sum[g][2 * i], x, pv);
        accumulate(sum[g][2 * i + 1], y, pv);
      }
      if (kTight) keep_order();
    }
    v += head_dim;
    p++;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NC; i++)
      _mm256_store_ps(acc + g * head_dim + 8 * i, sum[g][i]);
  return ahead;
}

template <class T, int GT, bool PREFETCH>
TOPT_TILE const char* value_chunk(const T* v, int head_dim, int num_rows, const float* p, int p_stride, float* acc,
                                  const char* ahead) {
  constexpr int NC = GT == 1 ? 4 : GT == 4 ? 1 : 2;
  int c = 0;
  for (; c + 16 * NC <= head_dim; c += 16 * NC)
    ahead = value_tile<T, GT, NC, PREFETCH>(v + c, head_dim, num_rows, p, p_stride, acc + c, ahead);
  for (; c < head_dim; c += 16)
    ahead = value_tile<T, GT, 1, PREFETCH>(v + c, head_dim, num_rows, p, p_stride, acc + c, ahead);
  return ahead;
}

// Adds the weighted sum of `num_rows` scattered V rows to 16 * NC columns of one head's accumulator.
template <class T, int NC>
TOPT_TILE void gather_tile(const T* __restrict v, const int32_t* __restrict offsets, const float* __restrict p,
                           int num_rows, float* __restrict acc) {
  __m256 sum[2 * NC];
  TOPT_UNROLL for (int i = 0; i < 2 * NC; i++) sum[i] = _mm256_load_ps(acc + 8 * i);
  for (int r = 0; r < num_rows; r++) {
    const T* row = v + offsets[r];
    const __m256 pv = _mm256_broadcast_ss(p + r);
    TOPT_UNROLL for (int i = 0; i < NC; i++) {
      __m256 x, y;
      Elem<T>::load16(row + 16 * i, x, y);
      accumulate(sum[2 * i], x, pv);
      accumulate(sum[2 * i + 1], y, pv);
    }
  }
  TOPT_UNROLL for (int i = 0; i < 2 * NC; i++) _mm256_store_ps(acc + 8 * i, sum[i]);
}

template <class T>
void gather_rows(const T* v, int head_dim, const int32_t* offsets, const float* p, int num_rows, float* acc) {
  int c = 0;
  for (; c + 64 <= head_dim; c += 64) gather_tile<T, 4>(v + c, offsets, p, num_rows, acc + c);
  for (; c < head_dim; c += 16) gather_tile<T, 1>(v + c, offsets, p, num_rows, acc + c);
}

// Bits [begin, end) of a word, both clamped to it.
inline uint64_t bits_between(int begin, int end) {
  begin = std::clamp(begin, 0, 64);
  end = std::clamp(end, 0, 64);
  if (begin >= end) return 0;
  return (end == 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & ~uint64_t{0} << begin;
}

TOPT_TILE float max_of(const float* s, int begin, int end) {
  __m256 a = _mm256_load_ps(s + begin), b = _mm256_load_ps(s + begin + 8);
  for (int t = begin + 16; t < end; t += 16) {
    a = _mm256_max_ps(a, _mm256_load_ps(s + t));
    b = _mm256_max_ps(b, _mm256_load_ps(s + t + 8));
  }
  return horizontal_max(_mm256_max_ps(a, b));
}

TOPT_TILE void apply_soft_cap(float* s, int begin, int end, float cap) {
  const __m256 c = _mm256_set1_ps(cap);
  for (int t = begin; t < end; t += 8) _mm256_store_ps(s + t, _mm256_mul_ps(c, tanh8(_mm256_load_ps(s + t))));
}

// Replaces scores of tokens [begin, end), multiples of 16, by exp2(score - max) and returns their sum.
// PRUNE: writes zero where the score is below theta, and one bit a token, "score >= theta"; LOST: also the eight-lane
// sums of what stays below, one vector per 16 tokens.
template <bool PRUNE, bool LOST>
TOPT_TILE float exponentials(float* __restrict s, int begin, int end, float max, float theta,
                             uint64_t* __restrict kept, float* __restrict lost, const char* ahead) {
  const __m256 m = _mm256_set1_ps(max), limit = _mm256_set1_ps(theta);
  __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
  for (int t = begin; t < end; t += 16) {
    prefetch(ahead);
    ahead += 64;
    const __m256 x0 = _mm256_load_ps(s + t), x1 = _mm256_load_ps(s + t + 8);
    const __m256 e0 = exp2_nonpositive(_mm256_sub_ps(x0, m)), e1 = exp2_nonpositive(_mm256_sub_ps(x1, m));
    sum0 = _mm256_add_ps(sum0, e0);
    sum1 = _mm256_add_ps(sum1, e1);
    if (!PRUNE) {
      _mm256_store_ps(s + t, e0);
      _mm256_store_ps(s + t + 8, e1);
    } else {
      const __m256 k0 = _mm256_cmp_ps(x0, limit, _CMP_GE_OQ), k1 = _mm256_cmp_ps(x1, limit, _CMP_GE_OQ);
      const uint16_t bits = static_cast<uint16_t>(_mm256_movemask_ps(k0) | _mm256_movemask_ps(k1) << 8);
      std::memcpy(reinterpret_cast<char*>(kept) + t / 8, &bits, sizeof(bits));
      _mm256_store_ps(s + t, _mm256_and_ps(k0, e0));
      _mm256_store_ps(s + t + 8, _mm256_and_ps(k1, e1));
      if (LOST)
        _mm256_store_ps(lost + t / 2, _mm256_add_ps(_mm256_andnot_ps(k0, e0), _mm256_andnot_ps(k1, e1)));
    }
  }
  return horizontal_sum(_mm256_add_ps(sum0, sum1));
}

// p += lost of the token's group * share, tokens [begin, end), multiples of 16.
// lost: one value per group of 2^group_shift tokens; share: one value per 16 tokens.
TOPT_TILE void spread_lost(float* __restrict p, int begin, int end, const float* __restrict lost, int group_shift,
                           const float* __restrict share) {
  for (int t = begin; t < end; t += 16) {
    const __m256 spread = _mm256_set1_ps(lost[t >> group_shift] * share[t / 16]);
    _mm256_store_ps(p + t, _mm256_add_ps(_mm256_load_ps(p + t), spread));
    _mm256_store_ps(p + t + 8, _mm256_add_ps(_mm256_load_ps(p + t + 8), spread));
  }
}

TOPT_INLINE void scale_row(float* row, int n, float factor) {
  const __m256 f = _mm256_set1_ps(factor);
  for (int d = 0; d < n; d += 8) _mm256_store_ps(row + d, _mm256_mul_ps(f, _mm256_load_ps(row + d)));
}

// Turns a sum from the order of Elem<T>::load16 into the natural one.
template <class T>
TOPT_TILE void unpermute_row(float* row, int head_dim) {
  for (int d = 0; d < head_dim; d += 16) {
    __m256 x = _mm256_load_ps(row + d), y = _mm256_load_ps(row + d + 8);
    Elem<T>::unpermute(x, y);
    _mm256_store_ps(row + d, x);
    _mm256_store_ps(row + d + 8, y);
  }
}

// row += factor * x, both in natural order.
template <class T>
TOPT_INLINE void add_scaled(float* row, const T* x, int n, float factor) {
  const __m256 f = _mm256_set1_ps(factor);
  for (int d = 0; d < n; d += 16) {
    __m256 a, b;
    load16_natural(x + d, a, b);
    _mm256_store_ps(row + d, _mm256_fmadd_ps(a, f, _mm256_load_ps(row + d)));
    _mm256_store_ps(row + d + 8, _mm256_fmadd_ps(b, f, _mm256_load_ps(row + d + 8)));
  }
}

}  // namespace topt
