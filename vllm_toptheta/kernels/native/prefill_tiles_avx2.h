// The inner loops of prefill attention: packed keys against blocks of query rows, and weighted sums of V rows.
//
// A score is the same chain of fused multiply-adds as in decode (tiles_avx2.h), so a row selects the same keys whether
// it is computed alone or among others.
#pragma once

#include "tiles_avx2.h"

namespace topt {

constexpr int kKeyTile = 128;  // keys that all rows of a query tile attend to before the next ones are loaded
constexpr int kUnits = kKeyTile / 16;
constexpr int kRowBlock = 6;   // query rows in registers: 6 x 16 accumulators leave room for two vectors of keys

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

// A row of V or of its means as floats, in the order of Elem<T>::load16.
template <class T>
TOPT_INLINE void pack_row(const T* __restrict v, int head_dim, float* __restrict row) {
  for (int d = 0; d < head_dim; d += 16) {
    __m256 a, b;
    Elem<T>::load16(v + d, a, b);
    _mm256_store_ps(row + d, a);
    _mm256_store_ps(row + d + 8, b);
  }
}

// Scores of NR rows with 16 keys. panel: [head_dim][16]; q: [head_dim][NR]; s: NR rows of kKeyTile.
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
    _mm256_store_ps(s + r * kKeyTile, acc[r][0]);
    _mm256_store_ps(s + r * kKeyTile + 8, acc[r][1]);
  }
}

// acc += p v for NR rows. v: [num_keys][v_stride]; p: NR rows of p_stride; acc: NR rows of head_dim.
template <int NR>
TOPT_TILE void value_block(const float* __restrict v, int v_stride, int num_keys, const float* __restrict p,
                           int p_stride, float* __restrict acc, int head_dim) {
  for (int c = 0; c < head_dim; c += 16) {
    __m256 sum[NR][2];
    TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < 2; i++)
        sum[r][i] = _mm256_load_ps(acc + r * head_dim + c + 8 * i);
    const float* row = v + c;
    for (int t = 0; t < num_keys; t++) {
      const __m256 x = _mm256_load_ps(row), y = _mm256_load_ps(row + 8);
      TOPT_UNROLL for (int r = 0; r < NR; r++) {
        const __m256 pv = _mm256_broadcast_ss(p + r * p_stride + t);
        accumulate(sum[r][0], x, pv);
        accumulate(sum[r][1], y, pv);
      }
      keep_order();
      row += v_stride;
    }
    TOPT_UNROLL for (int r = 0; r < NR; r++) TOPT_UNROLL for (int i = 0; i < 2; i++)
        _mm256_store_ps(acc + r * head_dim + c + 8 * i, sum[r][i]);
  }
}

// acc += p v over a list of V rows, 16 * NC columns of one query row.
template <class T, int NC>
TOPT_TILE void listed_tile(const T* const* rows, int column, const float* __restrict p, int num_rows,
                           float* __restrict acc) {
  __m256 sum[2 * NC];
  TOPT_UNROLL for (int i = 0; i < 2 * NC; i++) sum[i] = _mm256_load_ps(acc + 8 * i);
  for (int r = 0; r < num_rows; r++) {
    const T* row = rows[r] + column;
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
void listed_rows(const T* const* rows, int head_dim, const float* p, int num_rows, float* acc) {
  int c = 0;
  for (; c + 64 <= head_dim; c += 64) listed_tile<T, 4>(rows, c, p, num_rows, acc + c);
  for (; c < head_dim; c += 16) listed_tile<T, 1>(rows, c, p, num_rows, acc + c);
}

}  // namespace topt
