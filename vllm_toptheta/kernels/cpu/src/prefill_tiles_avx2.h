// The inner loops of prefill attention: packed keys against blocks of query rows, what rows keep, and weighted sums of
// V rows.
//
// A score is one chain of fused multiply-adds over the dimensions in ascending order, so a row keeps the same keys
// whether it is computed alone or among others.
#pragma once

#include <type_traits>

#include "tiles_avx2.h"

namespace topt {

constexpr int kKeyTile = 128;  // keys that all rows of a query tile attend to before the next ones are loaded
constexpr int kUnits = kKeyTile / 16;
constexpr int kWeights = kKeyTile + 16;  // weights of a query row: of the keys, then of the means of their groups
constexpr int kRowBlock = 6;   // query rows in registers: 6 x 16 accumulators leave room for two vectors of keys

// Thirty-two bf16 pairs of an AMX tile: what stands first and second in each of 16 pairs.
TOPT_INLINE void load_pairs(const bf16* p, __m256 (&first)[2], __m256 (&second)[2]) {
  TOPT_UNROLL for (int i = 0; i < 2; i++) Elem<bf16>::load16(p + 16 * i, first[i], second[i]);
}

// K of 16 tokens as floats: k [head_dim][k_stride] to panel [head_dim][16]. Without it the rows of K would fall into
// few cache sets, and bf16 would be converted once per block of query rows.
template <class T>
TOPT_TILE void pack_keys(const T* __restrict k, int k_stride, int head_dim, float* __restrict panel) {
  for (int d = 0; d < head_dim; d++) {
    __m256 a, b;
    load16_natural(k + static_cast<size_t>(d) * k_stride, a, b);
    _mm256_store_ps(panel + 16 * d, a);
    _mm256_store_ps(panel + 16 * d + 8, b);
  }
}

// The same from an AMX tile, [head_dim / 2][16 tokens][2].
TOPT_TILE void pack_keys_amx(const bf16* __restrict k, int head_dim, float* __restrict panel) {
  for (int d = 0; d < head_dim; d += 2) {
    __m256 even[2], odd[2];
    load_pairs(k + 16 * d, even, odd);
    TOPT_UNROLL for (int i = 0; i < 2; i++) {
      _mm256_store_ps(panel + 16 * d + 8 * i, even[i]);
      _mm256_store_ps(panel + 16 * d + 16 + 8 * i, odd[i]);
    }
  }
}

// A row of V or of its means as floats, in the order of Elem<T>::load16 or the natural one.
template <class T>
TOPT_INLINE void pack_row(const T* __restrict v, int head_dim, bool natural, float* __restrict row) {
  for (int d = 0; d < head_dim; d += 16) {
    __m256 a, b;
    Elem<T>::load16(v + d, a, b);
    if (natural) Elem<T>::unpermute(a, b);
    _mm256_store_ps(row + d, a);
    _mm256_store_ps(row + d + 8, b);
  }
}

// A row of V from AMX tiles, [head_dim / 16][tile_stride]: v is where its pair of tokens starts.
TOPT_INLINE void pack_row_amx(const bf16* __restrict v, int tile_stride, bool odd_token, int head_dim,
                              float* __restrict row) {
  for (int d = 0; d < head_dim; d += 16, v += tile_stride) {
    __m256 even[2], odd[2];
    load_pairs(v, even, odd);
    TOPT_UNROLL for (int i = 0; i < 2; i++) _mm256_store_ps(row + d + 8 * i, odd_token ? odd[i] : even[i]);
  }
}

// Scores of NR rows with 16 keys. panel: [head_dim][16]; q: [head_dim][NR]; s: NR rows of kWeights.
template <int NR>
TOPT_TILE void score_block(const float* __restrict panel, const float* __restrict q, int head_dim,
                           float* __restrict s) {
  __m256 acc[NR][2];
  TOPT_UNROLL for (int r = 0; r < NR; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int d = 0; d < head_dim; d += 2) {
    TOPT_UNROLL for (int u = 0; u < 2; u++) {
      const __m256 x = _mm256_load_ps(panel + 16 * u), y = _mm256_load_ps(panel + 16 * u + 8);
      TOPT_UNROLL for (int r = 0; r < NR; r++) {
        const __m256 qv = _mm256_broadcast_ss(q + u * NR + r);
        accumulate(acc[r][0], x, qv);
        accumulate(acc[r][1], y, qv);
      }
      keep_order();
    }
    panel += 32;
    q += 2 * NR;
  }
  TOPT_UNROLL for (int r = 0; r < NR; r++) {
    _mm256_store_ps(s + r * kWeights, acc[r][0]);
    _mm256_store_ps(s + r * kWeights + 8, acc[r][1]);
  }
}

// Where a V row and its weights are.
struct RowAt {
  size_t offset;
  int key;
};

// All rows of a tile, or those of listed keys.
struct RowsOf {
  int stride;
  TOPT_INLINE RowAt operator()(int t) const { return {static_cast<size_t>(t) * stride, t}; }
};
struct ListedRows {
  int stride;
  const int32_t* keys;
  TOPT_INLINE RowAt operator()(int t) const { return {static_cast<size_t>(keys[t]) * stride, keys[t]}; }
};

// acc += p v for NR rows and 16 * NC columns; row(t) says where the values are.
template <int NR, int NC, class Row>
TOPT_INLINE void value_columns(const float* __restrict v, Row row, int num_keys, const float* __restrict p,
                               int p_stride, float* __restrict acc, int head_dim) {
  __m256 sum[NR][2 * NC];
  TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < 2 * NC; i++)
      sum[r][i] = _mm256_load_ps(acc + r * head_dim + 8 * i);
  for (int t = 0; t < num_keys; t++) {
    const RowAt at = row(t);
    const float *values = v + at.offset, *weights = p + at.key;
    if constexpr (NR <= 3) {  // weights in registers, else values: there are sixteen
      __m256 pv[NR];
      TOPT_UNROLL for (int r = 0; r < NR; r++) pv[r] = _mm256_broadcast_ss(weights + r * p_stride);
      TOPT_UNROLL for (int i = 0; i < 2 * NC; i++) {
        const __m256 x = _mm256_load_ps(values + 8 * i);
        TOPT_UNROLL for (int r = 0; r < NR; r++) accumulate(sum[r][i], x, pv[r]);
      }
    } else {
      __m256 x[2 * NC];
      TOPT_UNROLL for (int i = 0; i < 2 * NC; i++) x[i] = _mm256_load_ps(values + 8 * i);
      TOPT_UNROLL for (int r = 0; r < NR; r++) {
        const __m256 pv = _mm256_broadcast_ss(weights + r * p_stride);
        TOPT_UNROLL for (int i = 0; i < 2 * NC; i++) accumulate(sum[r][i], x[i], pv);
      }
    }
    keep_order();
  }
  TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < 2 * NC; i++)
      _mm256_store_ps(acc + r * head_dim + 8 * i, sum[r][i]);
}

// acc += p v for NR rows. v: [num_keys][v_stride]; p: NR rows of p_stride; acc: NR rows of head_dim.
template <int NR>
TOPT_TILE void value_block(const float* __restrict v, int v_stride, int num_keys, const float* __restrict p,
                           int p_stride, float* __restrict acc, int head_dim) {
  const RowsOf row{v_stride};
  for (int c = 0; c < head_dim; c += 16) value_columns<NR, 1>(v + c, row, num_keys, p, p_stride, acc + c, head_dim);
}

// The same for listed keys only.
template <int NR>
TOPT_TILE void listed_block(const float* __restrict v, int v_stride, const int32_t* __restrict keys, int num_keys,
                            const float* __restrict p, int p_stride, float* __restrict acc, int head_dim) {
  constexpr int NC = NR == 1 ? 4 : NR <= 3 ? 2 : 1;  // enough chains to fill the FMA pipes
  const ListedRows row{v_stride, keys};
  int c = 0;
  for (; c + 16 * NC <= head_dim; c += 16 * NC)
    value_columns<NR, NC>(v + c, row, num_keys, p, p_stride, acc + c, head_dim);
  for (; c < head_dim; c += 16) value_columns<NR, 1>(v + c, row, num_keys, p, p_stride, acc + c, head_dim);
}

// Replaces scores of keys [begin, end), multiples of 16, by exp2(score - max) and returns their sum.
// LANES: also leaves the eight-lane sums, one vector per 16 keys.
template <bool LANES>
TOPT_TILE float prompt_exponentials(float* __restrict s, int begin, int end, float max, float* __restrict lanes) {
  const __m256 m = _mm256_set1_ps(max);
  __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
  for (int t = begin; t < end; t += 16) {
    const __m256 e0 = exp2_nonpositive(_mm256_sub_ps(_mm256_load_ps(s + t), m));
    const __m256 e1 = exp2_nonpositive(_mm256_sub_ps(_mm256_load_ps(s + t + 8), m));
    sum0 = _mm256_add_ps(sum0, e0);
    sum1 = _mm256_add_ps(sum1, e1);
    _mm256_store_ps(s + t, e0);
    _mm256_store_ps(s + t + 8, e1);
    if (LANES) _mm256_store_ps(lanes + t / 2, _mm256_add_ps(e0, e1));
  }
  return horizontal_sum(_mm256_add_ps(sum0, sum1));
}

// One bit a key, keys [begin, end): whether some head's exponential reaches its limit. e: [num_heads][kWeights].
TOPT_TILE void reaching(const float* __restrict e, int num_heads, const float* __restrict limits, int begin, int end,
                        uint64_t (&bits)[2]) {
  for (int t = begin; t < end; t += 16) {
    __m256 any0 = _mm256_setzero_ps(), any1 = any0;
    for (int h = 0; h < num_heads; h++) {
      const __m256 limit = _mm256_broadcast_ss(limits + h);
      const float* x = e + h * kWeights + t;
      any0 = _mm256_or_ps(any0, _mm256_cmp_ps(_mm256_load_ps(x), limit, _CMP_GE_OQ));
      any1 = _mm256_or_ps(any1, _mm256_cmp_ps(_mm256_load_ps(x + 8), limit, _CMP_GE_OQ));
    }
    const uint64_t word = _mm256_movemask_ps(any0) | _mm256_movemask_ps(any1) << 8;
    bits[t / 64] |= word << t % 64;
  }
}

// Zeroes the exponentials of 64 keys whose bits are not set, and leaves the eight-lane sums of the others.
TOPT_TILE void mask_kept(float* __restrict e, uint64_t kept, float* __restrict lanes) {
  const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  for (int t = 0; t < 64; t += 16, kept >>= 16) {
    const int bits = static_cast<int>(kept & 0xffff);
    const __m256 keeps0 = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(bits), to_sign));
    const __m256 keeps1 = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(bits >> 8), to_sign));
    const __m256 k0 = _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_load_ps(e + t), keeps0);
    const __m256 k1 = _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_load_ps(e + t + 8), keeps1);
    _mm256_store_ps(e + t, k0);
    _mm256_store_ps(e + t + 8, k1);
    _mm256_store_ps(lanes + t / 2, _mm256_add_ps(k0, k1));
  }
}

}  // namespace topt
