// The loops in which prefill attention spends most of its time, for CPUs with AVX-512.
//
// Only these functions may use it: the rest of the file that includes them is compiled for AVX2, and the caller asks
// the CPU. A lane is the same chain of fused multiply-adds as with AVX2, so both keep the same keys.
#pragma once

#include "prefill_tiles_avx2.h"
#include "tiles_avx512.h"

namespace topt {

// Scores of NR rows with 32 keys: `score_block` for two panels, [2][head_dim][16], at once.
template <int NR>
TOPT_TILE TOPT_AVX512 void score_pair_avx512(const float* __restrict panels, const float* __restrict q, int head_dim,
                                             float* __restrict s) {
  __m512 acc[NR][2];
  TOPT_UNROLL for (int r = 0; r < NR; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  const float* second = panels + static_cast<size_t>(head_dim) * 16;
  for (int d = 0; d < head_dim; d++) {
    const __m512 x = _mm512_load_ps(panels + 16 * d), y = _mm512_load_ps(second + 16 * d);
    TOPT_UNROLL for (int r = 0; r < NR; r++) {
      const __m512 qv = _mm512_set1_ps(q[r]);
      accumulate_wide(acc[r][0], x, qv);
      accumulate_wide(acc[r][1], y, qv);
    }
    q += NR;
  }
  TOPT_UNROLL for (int r = 0; r < NR; r++) {
    _mm512_store_ps(s + r * kKeyTile, acc[r][0]);
    _mm512_store_ps(s + r * kKeyTile + 16, acc[r][1]);
  }
}

// `value_block` for NC times 16 columns.
template <int NR, int NC>
TOPT_AVX512 TOPT_INLINE void value_columns_avx512(const float* __restrict v, int v_stride, int num_keys,
                                                  const float* __restrict p, int p_stride, float* __restrict acc,
                                                  int head_dim) {
  __m512 sum[NR][NC];
  TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < NC; i++)
      sum[r][i] = _mm512_load_ps(acc + r * head_dim + 16 * i);
  for (int t = 0; t < num_keys; t++) {
    __m512 x[NC];
    TOPT_UNROLL for (int i = 0; i < NC; i++) x[i] = _mm512_load_ps(v + 16 * i);
    TOPT_UNROLL for (int r = 0; r < NR; r++) {
      const __m512 pv = _mm512_set1_ps(p[r * p_stride + t]);
      TOPT_UNROLL for (int i = 0; i < NC; i++) accumulate_wide(sum[r][i], x[i], pv);
    }
    v += v_stride;
  }
  TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < NC; i++)
      _mm512_store_ps(acc + r * head_dim + 16 * i, sum[r][i]);
}

template <int NR>
TOPT_TILE TOPT_AVX512 void value_block_avx512(const float* __restrict v, int v_stride, int num_keys,
                                              const float* __restrict p, int p_stride, float* __restrict acc,
                                              int head_dim) {
  int c = 0;
  for (; c + 32 <= head_dim; c += 32)
    value_columns_avx512<NR, 2>(v + c, v_stride, num_keys, p, p_stride, acc + c, head_dim);
  if (c < head_dim) value_columns_avx512<NR, 1>(v + c, v_stride, num_keys, p, p_stride, acc + c, head_dim);
}

// Adds the V rows whose bits are set to 32 * NP columns of one query row. AVX-512 has the registers to do without the
// list that `listed_rows` passes over once per 64 columns.
template <class T, int NP>
TOPT_AVX512 TOPT_INLINE void kept_columns_avx512(const T* const* rows, int column, const uint64_t (&kept)[2],
                                                 const float* __restrict p, float* __restrict acc) {
  __m512 sum[2 * NP];
  TOPT_UNROLL for (int i = 0; i < NP; i++) {
    sum[2 * i] = _mm512_load_ps(acc + 32 * i);
    sum[2 * i + 1] = _mm512_load_ps(acc + 32 * i + 16);
    Wide<T>::regroup(sum[2 * i], sum[2 * i + 1]);
  }
  for (int w = 0; w < 2; w++)
    for (uint64_t bits = kept[w]; bits; bits &= bits - 1) {
      const int slot = 64 * w + __builtin_ctzll(bits);
      const T* row = rows[slot] + column;
      const __m512 pv = _mm512_set1_ps(p[slot]);
      TOPT_UNROLL for (int i = 0; i < NP; i++) {
        __m512 x, y;
        Wide<T>::load32(row + 32 * i, x, y);
        accumulate_wide(sum[2 * i], x, pv);
        accumulate_wide(sum[2 * i + 1], y, pv);
      }
    }
  TOPT_UNROLL for (int i = 0; i < NP; i++) {
    Wide<T>::regroup(sum[2 * i], sum[2 * i + 1]);
    _mm512_store_ps(acc + 32 * i, sum[2 * i]);
    _mm512_store_ps(acc + 32 * i + 16, sum[2 * i + 1]);
  }
}

// For a head_dim that is a multiple of 32.
template <class T>
TOPT_TILE TOPT_AVX512 void kept_rows_avx512(const T* const* rows, int head_dim, const uint64_t (&kept)[2],
                                            const float* p, float* acc) {
  int c = 0;
  for (; c + 128 <= head_dim; c += 128) kept_columns_avx512<T, 4>(rows, c, kept, p, acc + c);
  for (; c + 64 <= head_dim; c += 64) kept_columns_avx512<T, 2>(rows, c, kept, p, acc + c);
  if (c < head_dim) kept_columns_avx512<T, 1>(rows, c, kept, p, acc + c);
}

}  // namespace topt
