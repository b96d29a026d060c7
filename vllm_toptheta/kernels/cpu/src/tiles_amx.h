// The inner loops of decode attention over pages in AMX tiles (layout.py), as vLLM writes them where it uses AMX. Vector
// instructions do: what limits these loops is memory.
//
// A score is the same chain of fused multiply-adds as in other pages, so that all keep the same keys.
#pragma once

#include "tiles_avx512.h"

namespace topt {

// Adds q.k to the scores of 16 * NT tokens and GT heads. k: [NT][head_dim / 2][16][2]; q: [head_dim][GT];
// s: [GT][s_stride].
template <int GT, int NT>
TOPT_INLINE void score_tile_amx(const tiled_bf16* __restrict k, const float* __restrict q, int head_dim,
                                float* __restrict s, int s_stride, LineStream ahead) {
  __m256 acc[GT][2 * NT];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NT; i++) acc[g][i] = _mm256_setzero_ps();
  for (int d = 0; d < head_dim; d += 2, k += 32, q += 2 * GT) {
    TOPT_UNROLL for (int i = 0; i < 2 * NT; i++) {
      const size_t at = static_cast<size_t>(i / 2) * 16 * head_dim + i % 2 * 16;
      if (i % 2 == 0) ahead.fetch_at(at * sizeof(tiled_bf16));
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k + at));
      const __m256 first = Elem<tiled_bf16>::first(x), second = Elem<tiled_bf16>::second(x);
      TOPT_UNROLL for (int g = 0; g < GT; g++) accumulate(acc[g][i], first, _mm256_broadcast_ss(q + g));
      TOPT_UNROLL for (int g = 0; g < GT; g++) accumulate(acc[g][i], second, _mm256_broadcast_ss(q + GT + g));
      keep_order();
    }
    ahead.next += 64;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < 2 * NT; i++)
      _mm256_store_ps(s + g * s_stride + 8 * i, acc[g][i]);
}

template <int GT, int NT>
TOPT_AVX512 TOPT_INLINE void score_tile_amx_avx512(const tiled_bf16* __restrict k, const float* __restrict q,
                                                   int head_dim, float* __restrict s, int s_stride, LineStream ahead) {
  __m512 acc[GT][NT];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < NT; i++) acc[g][i] = _mm512_setzero_ps();
  for (int d = 0; d < head_dim; d += 2, k += 32, q += 2 * GT) {
    TOPT_UNROLL for (int i = 0; i < NT; i++) {
      const size_t at = static_cast<size_t>(i) * 16 * head_dim;
      ahead.fetch_at(at * sizeof(tiled_bf16));
      const __m512i x = _mm512_loadu_si512(k + at);
      const __m512 first = Wide<tiled_bf16>::first(x), second = Wide<tiled_bf16>::second(x);
      TOPT_UNROLL for (int g = 0; g < GT; g++) accumulate_wide(acc[g][i], first, _mm512_set1_ps(q[g]));
      TOPT_UNROLL for (int g = 0; g < GT; g++) accumulate_wide(acc[g][i], second, _mm512_set1_ps(q[GT + g]));
    }
    ahead.next += 64;
  }
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < NT; i++)
      _mm512_store_ps(s + g * s_stride + 16 * i, acc[g][i]);
}

// Scores of tokens [begin, end), multiples of 16, of a page. `fetch` gives what to prefetch beside a token's keys.
template <int GT, class Fetch>
TOPT_TILE void score_page_amx(const tiled_bf16* k, const float* q, int head_dim, float* s, int s_stride, int begin,
                              int end, Fetch fetch) {
  constexpr int NT = GT <= 2 ? 2 : 1;
  const auto tile = [&](int t) { return k + static_cast<size_t>(t) * head_dim; };
  int t = begin;
  for (; t + 16 * NT <= end; t += 16 * NT)
    score_tile_amx<GT, NT>(tile(t), q, head_dim, s + t, s_stride, fetch(t));
  for (; t < end; t += 16) score_tile_amx<GT, 1>(tile(t), q, head_dim, s + t, s_stride, fetch(t));
}

template <int GT, class Fetch>
TOPT_TILE TOPT_AVX512 void score_page_amx_avx512(const tiled_bf16* k, const float* q, int head_dim, float* s,
                                                 int s_stride, int begin, int end, Fetch fetch) {
  constexpr int NT = GT <= 2 ? 4 : 2;  // at least eight chains of dependent sums, at most 16 accumulators
  const auto tile = [&](int t) { return k + static_cast<size_t>(t) * head_dim; };
  int t = begin;
  for (; t + 16 * NT <= end; t += 16 * NT)
    score_tile_amx_avx512<GT, NT>(tile(t), q, head_dim, s + t, s_stride, fetch(t));
  for (; t < end; t += 16) score_tile_amx_avx512<GT, 1>(tile(t), q, head_dim, s + t, s_stride, fetch(t));
}

// A V row in tiles: its first element, and the elements to the one 16 columns further on. The other token of its pair
// lies between its elements.
struct TiledRow {
  const tiled_bf16* first;
  ptrdiff_t stride;
  TOPT_INLINE const char* pairs(int column) const {
    return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(first + column / 16 * stride) & ~uintptr_t{3});
  }
  // By how much its elements shift to become floats.
  TOPT_INLINE __m128i shift() const {
    return _mm_cvtsi32_si128(16 - 8 * static_cast<int>(reinterpret_cast<uintptr_t>(first) & 2));
  }
};

TOPT_INLINE void load16(const TiledRow& row, int column, __m256& a, __m256& b) {
  const __m256i* pairs = reinterpret_cast<const __m256i*>(row.pairs(column));
  a = Elem<tiled_bf16>::second(_mm256_sll_epi32(_mm256_loadu_si256(pairs), row.shift()));
  b = Elem<tiled_bf16>::second(_mm256_sll_epi32(_mm256_loadu_si256(pairs + 1), row.shift()));
}

TOPT_AVX512 TOPT_INLINE void load32(const TiledRow& row, int column, __m512& a, __m512& b) {
  a = Wide<tiled_bf16>::second(_mm512_sll_epi32(_mm512_loadu_si512(row.pairs(column)), row.shift()));
  b = Wide<tiled_bf16>::second(_mm512_sll_epi32(_mm512_loadu_si512(row.pairs(column + 16)), row.shift()));
}

struct TiledRowList {
  const tiled_bf16* const* rows;
  ptrdiff_t stride;
  template <class T>
  static constexpr int lines(int columns) {
    return columns / 16;
  }
  TOPT_INLINE TiledRow operator()(int r) const { return {rows[r], stride}; }
};

}  // namespace topt
