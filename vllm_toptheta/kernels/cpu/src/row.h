// One row of decode attention: the query heads of one (sequence, kv head), its pages, and what is known about its keys.
#pragma once

#include <unistd.h>

#include <cmath>
#include <type_traits>

#include "arena.h"
#include "sketch.h"
#include "tiles_amx.h"

namespace topt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kNumWeights = 5;
template <class T>
constexpr int kLine = 64 / static_cast<int>(sizeof(T));  // elements

// Whether L1 holds a stream of three chunks beside what is being computed.
inline bool large_l1() {
  static const bool large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 * 1024;
  return large;
}

// Positions or groups [begin, end).
struct Span {
  int begin, end;
};

// Sizes of a call, and where things are. T is the cache dtype.
//
// Groups are numbered from the first one in the row's first page. Per head and group there are the largest score, then
// in units of that score's exponential the sum of all keys and the sum of kept keys. A key's weight is its exponential
// times `scale` of its group.
template <class T>
struct Geometry {
  explicit Geometry(const ToptDecodeArgs& args)
      : a(args),
        D(args.head_dim),
        B(args.block_size),
        G(args.num_heads / args.num_kv_heads),
        group_size(args.group_size),
        groups_per_block(B / group_size),
        block_of_group((uint64_t{1} << 32) / groups_per_block + 1),
        wide(a.avx512 && D % 32 == 0 && B % 32 == 0),
        near(large_l1()),
        num_tiles((G + max_tile_heads() - 1) / max_tile_heads()),
        tile_heads(G / num_tiles),
        wider_tiles(G % num_tiles) {}

  const ToptDecodeArgs& a;
  const int D, B, G;
  const int group_size, groups_per_block;
  const uint64_t block_of_group;      // a group times this, shifted by 32, is its block: divisions are slow
  const bool wide;                    // AVX-512: inner loops and the order of accumulators are those of Wide<T>
  const bool near;                    // what is read soon is prefetched into L1
  const int num_tiles;                // runs of at most max_tile_heads() heads that are computed together
  const int tile_heads, wider_tiles;  // heads in a tile; the first tiles have one more

  Span locate(int group) const {  // as {block, group of the block}
    const int block = static_cast<int>(group * block_of_group >> 32);
    return {block, group - block * groups_per_block};
  }

  int row_lines() const { return (D + kLine<T> - 1) / kLine<T>; }

  int max_tile_heads() const { return wide ? kMaxWideTileHeads : kMaxTileHeads; }
  int tile_begin(int tile) const { return tile * tile_heads + std::min(tile, wider_tiles); }

  Span span(int seq) const {
    const int n = std::max(a.seq_lens[seq], 0);
    return {a.window > 0 ? std::max(n - a.window, 0) : 0, n};
  }
  int num_blocks(const Span& s) const { return s.end > s.begin ? (s.end + B - 1) / B - s.begin / B : 0; }

  // Calls f with every tile of heads: its first head, and the number of heads as a compile-time constant.
  template <class F>
  TOPT_INLINE void for_tiles(F&& f) const {
    for (int tile = 0; tile < num_tiles; tile++) {
      const int g = tile_begin(tile);
      switch (tile_begin(tile + 1) - g) {
        case 1: f(g, std::integral_constant<int, 1>{}); break;
        case 2: f(g, std::integral_constant<int, 2>{}); break;
        case 3: f(g, std::integral_constant<int, 3>{}); break;
        case 4: f(g, std::integral_constant<int, 4>{}); break;
        case 5: f(g, std::integral_constant<int, 5>{}); break;
        case 6: f(g, std::integral_constant<int, 6>{}); break;
        case 7: f(g, std::integral_constant<int, 7>{}); break;
        default: f(g, std::integral_constant<int, 8>{}); break;
      }
    }
  }
};

// The state of a row between its scan and its gather.
template <class T>
struct Row {
  const Geometry<T>& geometry;
  int seq, kv_head;
  bool dense;
  Span visible;               // positions
  int first_block, num_blocks;
  Span groups, whole;         // groups with a visible key, and those whose keys are all visible
  int stride;                 // groups of a head in the arrays below: padded to whole vectors
  float* p;                   // [num_blocks][G][B] scores, then exponentials, then weights
  float *max, *sum;           // [G][stride]
  float *kept, *scale;        // [G][stride]
  float* limit;               // [G][stride] exponential from which a key is kept, then weights of the stored means
  uint64_t* mask;             // [stride] kept keys of a group, one bit each
  int32_t* candidates;        // [stride] groups that may have kept keys
  int32_t* rows_before;       // [stride + 1] V rows and means that the gather of earlier groups reads
  bool reads_means;
  int whole_from;             // a group that keeps at least so many keys has all its V rows read

  // Whether the gather walks over all V rows of a group.
  bool reads_whole(int group) const {
    return !kTiled<T> && group >= whole.begin && group < whole.end && __builtin_popcountll(mask[group]) >= whole_from;
  }

  Row(const Geometry<T>& g, int seq, int kv_head) : geometry(g), seq(seq), kv_head(kv_head) {
    dense = g.a.dense[seq] != 0;
    visible = g.span(seq);
    num_blocks = g.num_blocks(visible);
    first_block = visible.begin / g.B;
    const int origin = first_block * g.B, size = g.group_size;
    groups = {(visible.begin - origin) / size, (visible.end - origin + size - 1) / size};
    whole = {(visible.begin - origin + size - 1) / size, (visible.end - origin) / size};
    stride = stride_of(g, num_blocks);
  }

  static int stride_of(const Geometry<T>& g, int num_blocks) { return (num_blocks * g.groups_per_block + 7) & ~7; }

  static size_t bytes(const Geometry<T>& g, int num_blocks) {
    const size_t stride = stride_of(g, num_blocks), per_group = Arena::bytes_for<float>(g.G * stride);
    return Arena::bytes_for<float>(static_cast<size_t>(num_blocks) * g.G * g.B) + 5 * per_group +
           Arena::bytes_for<uint64_t>(stride) + 2 * Arena::bytes_for<int32_t>(stride + 1);
  }

  void take_buffers(Arena& arena) {
    const Geometry<T>& g = geometry;
    const size_t n = static_cast<size_t>(g.G) * stride;
    p = arena.take<float>(static_cast<size_t>(num_blocks) * g.G * g.B);
    for (float** part : {&max, &sum, &kept, &scale, &limit}) *part = arena.take<float>(n);
    mask = arena.take<uint64_t>(stride);
    candidates = arena.take<int32_t>(stride + 1);
    rows_before = arena.take<int32_t>(stride + 1);
    std::fill_n(max, n, -INFINITY);
    std::fill_n(sum, n, 0.0f);
  }

  // Whether the block table names existing blocks for blocks [begin, end) of the row.
  bool has_blocks(int begin, int end) const {
    const Geometry<T>& g = geometry;
    if (first_block + end > g.a.max_blocks) return false;
    for (int b = begin; b < end; b++) {
      const int32_t id = table()[b];
      if (id < 0 || id >= g.a.num_blocks) return false;
    }
    return true;
  }

  const int32_t* table() const { return geometry.a.block_table + seq * geometry.a.block_table_stride + first_block; }

  const T* page(int block) const {
    const ToptDecodeArgs& a = geometry.a;
    return static_cast<const T*>(a.kv_cache) + int64_t{table()[block]} * a.block_stride + kv_head * a.head_stride;
  }
  // A V row's first element, the cache lines it lies in, and the elements from one to the next.
  const T* v_row(int block, int slot) const {
    const T* v = page(block) + static_cast<size_t>(geometry.B) * geometry.D;
    return kTiled<T> ? v + slot / 2 * 32 + slot % 2 : v + static_cast<size_t>(slot) * geometry.D;
  }
  int v_lines() const { return kTiled<T> ? geometry.D / 16 : geometry.row_lines(); }
  int v_line_stride() const { return kTiled<T> ? 16 * geometry.B : kLine<T>; }
  const T* mean(int group) const {
    const auto [block, i] = geometry.locate(group);
    return page(block) + static_cast<size_t>(2 * geometry.B + i) * geometry.D;
  }

  // K, or V, behind a byte of a block's, as far ahead as it is worth to prefetch what is read in that
  // order; blocks behind `last` count as it. AVX-512 needs it from further on, because it is done with a chunk before the
  // next one can arrive.
  const char* ahead(int block, size_t byte, int last, bool values) const {
    const Geometry<T>& g = geometry;
    const size_t size = static_cast<size_t>(g.D) * g.B * sizeof(T);
    for (byte += (g.wide ? 3 : 1) * kChunkBytes; byte >= size; byte -= size) block++;
    return reinterpret_cast<const char*>(page(std::min(block, last))) + (values ? size : 0) + byte;
  }

  // The sketch in a page as far behind a block's.
  SketchPage<T> sketch_ahead(int block, int last) const {
    const int size = geometry.D * geometry.B, pages = ((geometry.wide ? 3 : 1) * kChunkBytes + size - 1) / size;
    return sketch(std::min(block + pages, last));
  }
  SketchPage<T> sketch(int block) const {
    return {page(block), geometry.D, geometry.B, geometry.groups_per_block};
  }

  float* p_of(int block, int head) const { return p + (static_cast<size_t>(block) * geometry.G + head) * geometry.B; }
  // The first head's part of a group; others are B further on each.
  float* p_of_group(int group) const {
    const auto [block, i] = geometry.locate(group);
    return p_of(block, 0) + i * geometry.group_size;
  }

  // One bit for every key of a group that the row sees.
  uint64_t visible_bits(int group) const {
    const int at = first_block * geometry.B + group * geometry.group_size;
    return bits_between(visible.begin - at, std::min(visible.end - at, geometry.group_size));
  }
};

}  // namespace topt
