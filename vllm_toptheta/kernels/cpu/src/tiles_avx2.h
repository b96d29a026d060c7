// The inner loops of decode attention: scores of a page, exponentials of its groups, and weighted sums of V rows.
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
// k: [num_dims][k_stride]; q: [num_dims][GT]; s: [GT][s_stride]. Advances what it prefetches.
template <class T, int GT, int NT, class Lines>
TOPT_INLINE void score_tile(const T* __restrict k, int k_stride, const float* __restrict q, int num_dims,
                                 bool first, bool last, float* __restrict s, int s_stride, Lines& ahead) {
  __m256 acc[GT][2 * NT];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NT; i++)
      acc[g][i] = first ? _mm256_setzero_ps() : _mm256_load_ps(s + g * s_stride + 8 * i);
  constexpr bool kTight = GT * NT > 4;
  constexpr int kLines = NT * 16 * sizeof(T) * 2 / 64;  // cache lines in two dimensions
  for (int d = 0; d < num_dims; d += 2) {
    ahead.fetch(kLines);
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
}

// Scores of tokens [begin, end), multiples of 16, over one chunk of dimensions.
template <class T, int GT, class Lines>
TOPT_TILE void score_chunk(const T* k, int k_stride, const float* q, int num_dims, bool first, bool last, float* s,
                           int s_stride, int begin, int end, Lines ahead) {
  constexpr int NT = GT == 1 ? 4 : GT == 4 ? 1 : 2;  // enough independent chains to fill the FMA pipes
  int t = begin;
  for (; t + 16 * NT <= end; t += 16 * NT)
    score_tile<T, GT, NT>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
  for (; t < end; t += 16) score_tile<T, GT, 1>(k + t, k_stride, q, num_dims, first, last, s + t, s_stride, ahead);
}

// Rows at consecutive addresses, or anywhere; what they return is read by load16 and load32.
struct WholeRows {
  template <class T>
  static constexpr int lines(int columns) {
    return columns * static_cast<int>(sizeof(T)) / 64;
  }
};
template <class T>
struct RowRun : WholeRows {
  const T* first;
  int head_dim;
  RowRun(const T* first, int head_dim) : first(first), head_dim(head_dim) {}
  TOPT_INLINE const T* operator()(int r) const { return first + static_cast<size_t>(r) * head_dim; }
};
template <class T>
struct RowList : WholeRows {
  const T* const* rows;
  explicit RowList(const T* const* rows) : rows(rows) {}
  TOPT_INLINE const T* operator()(int r) const { return rows[r]; }
};
template <class T>
TOPT_INLINE void load16(const T* row, int column, __m256& a, __m256& b) {
  Elem<T>::load16(row + column, a, b);
}

// Weights of the rows that a tile adds: factor * p, per head.
struct RowWeights {
  const float* p;       // [GT][p_stride]
  const float* factor;  // [GT][factor_stride]
  int p_stride, factor_stride;
};

// Adds the weighted sum of V rows to 16 * NC columns of the accumulators of GT heads, and prefetches as many lines as
// it reads. acc: [GT][head_dim], in the order of Elem<T>::load16.
template <class T, int GT, int NC, class Rows, class Lines>
TOPT_INLINE void value_tile(Rows rows, int column, int head_dim, int num_rows, const RowWeights& weights,
                            float* __restrict acc, Lines& ahead) {
  __m256 sum[GT][2 * NC];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NC; i++)
      sum[g][i] = _mm256_setzero_ps();
  constexpr bool kTight = GT * NC > 4;
  constexpr int kLines = Rows::template lines<T>(NC * 16 * 2);  // in two rows
  const float* p = weights.p;
  const int p_stride = weights.p_stride;
  for (int r = 0; r < num_rows; r++) {
    if (!(r & 1)) ahead.fetch(kLines);
    const auto row = rows(r);
    TOPT_UNROLL for (int i = 0; i < NC; i++) {
      __m256 x, y;
      load16(row, column + 16 * i, x, y);
      TOPT_UNROLL for (int g = 0; g < GT; g++) {
        const __m256 pv = _mm256_broadcast_ss(p + g * p_stride);
        accumulate(sum[g][2 * i], x, pv);
        accumulate(sum[g][2 * i + 1], y, pv);
      }
      if (kTight) keep_order();
    }
    p++;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) {
    const __m256 factor = _mm256_broadcast_ss(weights.factor + g * weights.factor_stride);
    float* to = acc + g * head_dim;
    TOPT_UNROLL for (int i = 0; i < 2 * NC; i++)
        _mm256_store_ps(to + 8 * i, _mm256_fmadd_ps(factor, sum[g][i], _mm256_load_ps(to + 8 * i)));
  }
}

template <class T, int GT, class Rows, class Lines>
TOPT_TILE void value_chunk(Rows rows, int head_dim, int num_rows, RowWeights weights, float* acc, Lines ahead) {
  constexpr int NC = GT == 1 ? 4 : GT == 4 ? 1 : 2;
  int c = 0;
  for (; c + 16 * NC <= head_dim; c += 16 * NC)
    value_tile<T, GT, NC>(rows, c, head_dim, num_rows, weights, acc + c, ahead);
  for (; c < head_dim; c += 16) value_tile<T, GT, 1>(rows, c, head_dim, num_rows, weights, acc + c, ahead);
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

// Replaces the scores of each group of SIZE tokens by exp2(score - max of the group); max and sum: one value a group,
// written for a multiple of eight groups. Lane i of a sum adds tokens i, i + 16, ... and those 8 further on, whatever
// the vectors' width. Prefetches a line per 16 tokens, so that memory does not rest meanwhile.
template <int SIZE>
TOPT_TILE void group_exponentials(float* __restrict s, int num_groups, float* __restrict max, float* __restrict sum,
                                  LineStream ahead) {
  alignas(32) float lanes[64] = {};
  for (int i = 0; i < num_groups; i += 8, s += 8 * SIZE) {
    const int n = std::min(8, num_groups - i);
    for (int j = 0; j < n; j++) {
      __m256 a = _mm256_load_ps(s + j * SIZE), b = _mm256_load_ps(s + j * SIZE + 8);
      TOPT_UNROLL for (int t = 16; t < SIZE; t += 16) {
        a = _mm256_max_ps(a, _mm256_load_ps(s + j * SIZE + t));
        b = _mm256_max_ps(b, _mm256_load_ps(s + j * SIZE + t + 8));
      }
      _mm256_store_ps(lanes + 8 * j, _mm256_max_ps(a, b));
    }
    _mm256_store_ps(max + i, transposed_maxima(lanes));
    for (int j = 0; j < n; j++) {
      const __m256 m = _mm256_broadcast_ss(max + i + j);
      __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
      TOPT_UNROLL for (int t = j * SIZE; t < (j + 1) * SIZE; t += 16) {
        ahead.fetch(1);
        const __m256 e0 = exp2_nonpositive(_mm256_sub_ps(_mm256_load_ps(s + t), m));
        const __m256 e1 = exp2_nonpositive(_mm256_sub_ps(_mm256_load_ps(s + t + 8), m));
        _mm256_store_ps(s + t, e0);
        _mm256_store_ps(s + t + 8, e1);
        sum0 = _mm256_add_ps(sum0, e0);
        sum1 = _mm256_add_ps(sum1, e1);
      }
      _mm256_store_ps(lanes + 8 * j, _mm256_add_ps(sum0, sum1));
    }
    _mm256_store_ps(sum + i, transposed_sums(lanes));
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

}  // namespace topt
