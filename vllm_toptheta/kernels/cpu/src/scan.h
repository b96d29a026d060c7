// The first half of a row: K, or its sketch, once, in address order, for the scores, and per group of tokens the largest
// one and the exponentials relative to it. Nothing here depends on other pages, so rows may be cut anywhere.
#pragma once

#include "row.h"

namespace topt {

template <class T>
class Scan {
 public:
  static size_t bytes(const Geometry<T>& g) {
    return Arena::bytes_for<float>(static_cast<size_t>(g.G) * g.D) + 3 * Arena::bytes_for<float>(padded_groups(g)) +
           SketchQuery::bytes(g.G, g.D) + Arena::bytes_for<float>(g.D);
  }

  Scan(const Row<T>& row, Arena& arena)
      : row(row),
        g(row.geometry),
        a(g.a),
        q(arena.take<float>(static_cast<size_t>(g.G) * g.D)),
        max(arena.take<float>(padded_groups(g))),
        sum(arena.take<float>(padded_groups(g))),
        offset(arena.take<float>(padded_groups(g))),
        sketched(a.sketch && !row.dense),
        sketch_query(arena, g.G, g.D) {
    float* head = arena.take<float>(g.D);
    const T* query = static_cast<const T*>(a.query) + row.seq * a.query_stride + size_t(row.kv_head) * g.G * g.D;
    const float scale = a.soft_cap > 0 ? a.sm_scale / a.soft_cap : a.sm_scale * kLog2E;
    g.for_tiles([&](int g0, auto heads) {
      for (int h = 0; h < heads; h++) {
        for (int d = 0; d < g.D; d += 16) {
          alignas(32) float x[16];
          __m256 lo, hi;
          load16_natural(query + static_cast<size_t>(g0 + h) * g.D + d, lo, hi);
          _mm256_store_ps(x, lo);
          _mm256_store_ps(x + 8, hi);
          for (int i = 0; i < 16; i++) {
            head[d + i] = x[i] * scale;
            q[static_cast<size_t>(g0) * g.D + (d + i) * heads + h] = head[d + i];
          }
        }
        if (sketched) sketch_query.set(g0 + h, h, heads, head, a.sm_scale / scale);
      }
    });
  }

  // Blocks [begin, end) of the row.
  void run(int begin, int end) {
    for (int b = begin; b < end; b++) {
      const int at = (row.first_block + b) * g.B;
      const Span visible = {std::max(row.visible.begin - at, 0), std::min(row.visible.end - at, g.B)};
      last_block = end - 1;
      if (sketched)
        score_by_group(b, visible);
      else
        score(b, visible);
      finish(b, visible);
    }
  }

 private:
  const Row<T>& row;
  const Geometry<T>& g;
  const ToptDecodeArgs& a;
  float* q;            // tiles of [D][tile heads]
  float *max, *sum;    // [G][groups of a page]
  float* offset;       // [G][groups of a page] score of a sketch's centre
  const bool sketched;
  SketchQuery sketch_query;
  int last_block = 0;  // of the run

  static int padded_groups(const Geometry<T>& g) { return (g.G * g.groups_per_block + 7) & ~7; }

  // What to prefetch while a byte of a block's K is read.
  LineStream ahead(int block, size_t byte) const { return {row.ahead(block, byte, last_block, false), g.near}; }

  // Scores of all heads with the visible keys of a page. K is cut into chunks that stay in L1 while all heads use
  // them; the first tile of heads prefetches.
  void score(int block, const Span& visible) const {
    if constexpr (kTiled<T>) return score_tiled(block, visible);
    const T* k = row.page(block);
    const int D = g.D, B = g.B, unit = g.wide ? 32 : 16;
    const int begin = visible.begin & -unit, end = (visible.end + unit - 1) & -unit;
    const int chunks = std::max<int>((static_cast<size_t>(D) * B * sizeof(T) + kChunkBytes - 1) / kChunkBytes, 1);
    const int step = ((D + chunks - 1) / chunks + 1) & ~1;
    for (int d = 0; d < D; d += step) {
      const int dims = std::min(step, D - d);
      const bool first = d == 0, last = d + dims == D;
      const T* chunk = k + static_cast<size_t>(d) * B;
      const LineStream next = ahead(block, static_cast<size_t>(d) * B * sizeof(T));
      g.for_tiles([&](int g0, auto heads) {
        constexpr int GT = decltype(heads)::value;
        const float* tile_q = q + static_cast<size_t>(g0) * D + static_cast<size_t>(d) * GT;
        float* s = row.p_of(block, g0);
        const auto run = [&](auto lines) {
          if constexpr (GT <= kMaxTileHeads)
            if (!g.wide) return score_chunk<T, GT>(chunk, B, tile_q, dims, first, last, s, B, begin, end, lines);
          score_chunk_avx512<T, GT>(chunk, B, tile_q, dims, first, last, s, B, begin, end, lines);
        };
        if (g0 == 0)
          run(next);
        else
          run(NoLines{});
      });
    }
  }

  // The same, with the sketches of groups that have one and that it serves.
  void score_by_group(int block, const Span& visible) const {
    const int n = g.groups_per_block, first = block * n;
    const SketchPage<T> sketch = row.sketch(block);
    uint64_t served = 0;
    for (int i = std::max(row.whole.begin - first, 0); i < std::min(row.whole.end - first, n); i++)
      served |= uint64_t{sketch_query.trusts(sketch.bounds[i], g.G)} << i;
    for (int i = visible.begin / g.group_size; i * g.group_size < visible.end;) {
      int end = i + 1;
      if (served >> i & 1) {
        score_sketch(block, sketch, i);
      } else {
        while (end * g.group_size < visible.end && !(served >> end & 1)) end++;
        score(block, {std::max(i * g.group_size, visible.begin), std::min(end * g.group_size, visible.end)});
      }
      i = end;
    }
  }

  void score_sketch(int block, const SketchPage<T>& sketch, int group) const {
    const int slot = group * g.group_size;
    const size_t at = static_cast<size_t>(slot) * g.D;
    const LineStream next = {reinterpret_cast<const char*>(row.sketch_ahead(block, last_block).codes) + at * 3 / 4, g.near};
    sketch_query.meet(sketch.centres + static_cast<size_t>(group) * g.D, g.G, offset + group, g.groups_per_block);
    g.for_tiles([&](int g0, auto heads) {
      constexpr int GT = decltype(heads)::value;
      const auto with = [&](auto size) {
        constexpr int SIZE = decltype(size)::value;
        const auto run = [&](auto score) {
          score(sketch.codes + at, sketch.scales + slot, sketch_query.tile(g0), g.D,
                offset + g0 * g.groups_per_block + group, g.groups_per_block, row.p_of(block, g0) + slot, g.B, next);
        };
#ifndef TOPT_EMULATE_AVX512
        if (g.wide && has_vnni()) return run(sketch_group_vnni<GT, SIZE>);
#endif
        run(sketch_group<GT, SIZE>);
      };
      switch (g.group_size) {
        case 16: return with(std::integral_constant<int, 16>{});
        case 32: return with(std::integral_constant<int, 32>{});
        default: return with(std::integral_constant<int, 64>{});
      }
    });
  }

  // The same for a page in tiles, whose keys lie in address order.
  void score_tiled(int block, const Span& visible) const {
    const T* k = row.page(block);
    const int begin = visible.begin & -16, end = (visible.end + 15) & -16;
    const auto fetch = [&](int t) { return ahead(block, t * g.D * sizeof(T)); };
    g.for_tiles([&](int g0, auto heads) {
      constexpr int GT = decltype(heads)::value;
      const float* tile_q = q + static_cast<size_t>(g0) * g.D;
      float* s = row.p_of(block, g0);
      if constexpr (GT <= kMaxTileHeads)
        if (!g.wide) return score_page_amx<GT>(k, tile_q, g.D, s, g.B, begin, end, fetch);
      score_page_amx_avx512<GT>(k, tile_q, g.D, s, g.B, begin, end, fetch);
    });
  }

  // From scores to exponentials, a group at a time.
  void finish(int block, const Span& visible) const {
    float* s = row.p_of(block, 0);
    for (int h = 0; h < g.G; h++) {
      float* of_head = s + static_cast<size_t>(h) * g.B;
      if (a.soft_cap > 0) apply_soft_cap(of_head, visible.begin & ~15, (visible.end + 15) & ~15, a.soft_cap * kLog2E);
      // Slots outside the row may hold anything, NaN included.
      std::fill(of_head, of_head + visible.begin, -INFINITY);
      std::fill(of_head + visible.end, of_head + g.B, -INFINITY);
    }
    LineStream next = ahead(block + 1, 0);
    if (sketched) next.next = reinterpret_cast<const char*>(row.sketch_ahead(block, last_block).codes + g.D * g.B * 3 / 4);
    exponentials()(s, g.G * g.groups_per_block, max, sum, next);
    const int first = visible.begin / g.group_size, end = (visible.end + g.group_size - 1) / g.group_size;
    for (int h = 0; h < g.G; h++) {
      const size_t to = static_cast<size_t>(h) * row.stride + block * g.groups_per_block;
      for (int i = first; i < end; i++) {
        row.max[to + i] = max[h * g.groups_per_block + i];
        row.sum[to + i] = sum[h * g.groups_per_block + i];
      }
    }
  }

  auto exponentials() const {
    switch (g.group_size) {
      case 16: return group_exponentials<16>;
      case 32: return g.wide ? group_exponentials_avx512<32> : group_exponentials<32>;
      default: return g.wide ? group_exponentials_avx512<64> : group_exponentials<64>;
    }
  }
};

}  // namespace topt
