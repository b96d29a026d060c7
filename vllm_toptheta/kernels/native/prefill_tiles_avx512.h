// The two loops in which prefill attention spends most of its time, for CPUs with AVX-512.
//
// Only these functions may use it: the rest of the file that includes them is compiled for AVX2, and the caller asks
// the CPU. A lane is the same chain of fused multiply-adds as with AVX2, so both keep the same keys.
#pragma once

#include "prefill_tiles_avx2.h"

namespace topt {

#define TOPT_AVX512 __attribute__((target("avx512f")))

// acc += x * y; see `accumulate`.
TOPT_AVX512 TOPT_INLINE void accumulate_wide(__m512& acc, __m512 x, __m512 y) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
}

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
                                                uint64_t* __restrict kept, float* __restrict lost) {
  const __m512 m = _mm512_set1_ps(max), limit = _mm512_set1_ps(theta);
  __m512 sum = _mm512_setzero_ps();
  for (int t = begin; t < end; t += 16) {
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

}  // namespace topt
