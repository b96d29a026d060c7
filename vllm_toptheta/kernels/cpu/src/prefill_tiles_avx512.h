// The loops in which prefill attention spends most of its time (prefill_tiles_avx2.h), for CPUs with AVX-512.
//
// Only these functions may use it: the rest of the file that includes them is compiled for AVX2, and the caller is told
// whether the CPU has it. A lane is the same chain of operations as with AVX2, so both keep the same keys.
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
    _mm512_store_ps(s + r * kWeights, acc[r][0]);
    _mm512_store_ps(s + r * kWeights + 16, acc[r][1]);
  }
}

// `value_columns` for 16 * NC columns.
template <int NR, int NC, class Row>
TOPT_AVX512 TOPT_INLINE void value_columns_avx512(const float* __restrict v, Row row, int num_keys,
                                                  const float* __restrict p, int p_stride, float* __restrict acc,
                                                  int head_dim) {
  __m512 sum[NR][NC];
  TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < NC; i++)
      sum[r][i] = _mm512_load_ps(acc + r * head_dim + 16 * i);
  for (int t = 0; t < num_keys; t++) {
    const RowAt at = row(t);
    __m512 x[NC];
    TOPT_UNROLL for (int i = 0; i < NC; i++) x[i] = _mm512_load_ps(v + at.offset + 16 * i);
    TOPT_UNROLL for (int r = 0; r < NR; r++) {
      const __m512 pv = _mm512_set1_ps(p[r * p_stride + at.key]);
      TOPT_UNROLL for (int i = 0; i < NC; i++) accumulate_wide(sum[r][i], x[i], pv);
    }
  }
  TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < NC; i++)
      _mm512_store_ps(acc + r * head_dim + 16 * i, sum[r][i]);
}

// As many times 16 * NC columns as there are, then 16 at a time.
template <int NR, int NC, class Row>
TOPT_AVX512 TOPT_INLINE void value_rows_avx512(const float* v, Row row, int num_keys, const float* p, int p_stride,
                                               float* acc, int head_dim) {
  int c = 0;
  for (; c + 16 * NC <= head_dim; c += 16 * NC)
    value_columns_avx512<NR, NC>(v + c, row, num_keys, p, p_stride, acc + c, head_dim);
  for (; c < head_dim; c += 16)
    value_columns_avx512<NR, 1>(v + c, row, num_keys, p, p_stride, acc + c, head_dim);
}

template <int NR>
TOPT_TILE TOPT_AVX512 void value_block_avx512(const float* v, int v_stride, int num_keys, const float* p, int p_stride,
                                              float* acc, int head_dim) {
  value_rows_avx512<NR, 2>(v, RowsOf{v_stride}, num_keys, p, p_stride, acc, head_dim);
}

template <int NR>
TOPT_TILE TOPT_AVX512 void listed_block_avx512(const float* v, int v_stride, const int32_t* keys, int num_keys,
                                               const float* p, int p_stride, float* acc, int head_dim) {
  constexpr int NC = NR == 1 ? 8 : NR <= 3 ? 4 : 2;
  value_rows_avx512<NR, NC>(v, ListedRows{v_stride, keys}, num_keys, p, p_stride, acc, head_dim);
}

// `prompt_exponentials` with AVX-512.
template <bool LANES>
TOPT_TILE TOPT_AVX512 float prompt_exponentials_avx512(float* __restrict s, int begin, int end, float max,
                                                       float* __restrict lanes) {
  const __m512 m = _mm512_set1_ps(max);
  __m512 sum = _mm512_setzero_ps();
  for (int t = begin; t < end; t += 16) {
    const __m512 e = exp2_nonpositive_avx512(_mm512_sub_ps(_mm512_load_ps(s + t), m));
    sum = _mm512_add_ps(sum, e);
    _mm512_store_ps(s + t, e);
    if (LANES) _mm256_store_ps(lanes + t / 2, _mm256_add_ps(_mm512_castps512_ps256(e), upper_half(e)));
  }
  return horizontal_sum(_mm256_add_ps(_mm512_castps512_ps256(sum), upper_half(sum)));
}

}  // namespace topt
