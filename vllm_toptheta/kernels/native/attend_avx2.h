// Attention of the query heads of one (row, kv head) over a run of pages: scores, selection, weighted V rows.
#pragma once

#include <cmath>
#include <type_traits>

#include "arena.h"
#include "tiles_avx512.h"

namespace topt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMaxUnits = 32;     // runs of 16 tokens in the largest block
// A block that keeps more of its V rows than this is read as a whole. Both ways of reading rely on what was prefetched,
// so changing between them costs; a run of blocks that were read as a whole ends later than it began.
constexpr int kDensePercent = 24, kStillDensePercent = 14;
// With AVX-512 reading all of V costs less. Where a row is at most two cache lines it pays earlier.
constexpr int kNarrowRow = 128, kNarrowDensePercent = 14, kNarrowStillDensePercent = 8;

// What a task knows about one query head so far. Scores are in units of log2.
struct HeadState {
  float max, sum;
  int32_t num_kept;
  int32_t best_pos;      // position of the best key, tracked while no key was kept
  int32_t best_is_kept;  // another head keeps the V row of that key
};

// The keys that a row sees: positions [begin, end).
struct Span {
  int begin, end;
};

// Whether the last block of this thread read all of V; see PageAttention::attend.
inline thread_local bool last_read_v = false;

// Geometry of a call, and the work of one task. Heads are those of one kv head, numbered from 0.
template <class T>
class PageAttention {
 public:
  // Scores, kept bits and the page of one block; two of them alternate, so that survivors' V rows have the time of
  // the next block's scores to arrive.
  struct Block {
    float* p;        // [G][B] scores, then exponentials
    uint64_t* kept;  // [G][num_words] one bit a token
    const T* v;
    bool pending;    // kept rows still to be added
  };

  struct Task {
    int seq, kv_head;
    Span span;
    bool dense;
    float* q;           // tiles of [D][tile heads]
    float* theta;       // [G]
    float* lost;        // [G][lost_stride] lost mass of the block's compensation groups
    float* lost_lanes;  // [lost_stride][8] the same of one head per 16 tokens, not yet summed
    float* weights;     // [G][B] of the tokens in a group that the row sees in part
    int32_t* offsets;   // [B] kept rows of one head, elements from v
    float* gathered;    // [B] their weights
    int32_t* new_best;  // [G] slot of a new best key in this block, or -1
    Block blocks[2];
    HeadState* state;   // [G]
    float* acc;         // [G][D] weighted V sums, in the order of Elem<T>::load16, or of Wide<T>::load32
    int32_t num_union;  // V rows kept by any head
  };

  explicit PageAttention(const ToptDecodeArgs& args)
      : a(args),
        D(args.head_dim),
        B(args.block_size),
        G(args.num_heads / args.num_kv_heads),
        wide(a.avx512 && D % 32 == 0 && B % 32 == 0),
        num_tiles((G + max_tile_heads() - 1) / max_tile_heads()),
        tile_heads(G / num_tiles),
        wider_tiles(G % num_tiles),
        num_units(B / 16),
        num_words((B + 63) / 64),
        lost_stride((num_units + 7) & ~7),
        group_shift(__builtin_ctz(args.group_size)),
        dense_percent(has_narrow_rows() ? kNarrowDensePercent : kDensePercent),
        still_dense_percent(has_narrow_rows() ? kNarrowStillDensePercent : kStillDensePercent) {}

  const ToptDecodeArgs& a;
  const int D, B, G;
  const bool wide;                    // AVX-512: inner loops and the order of accumulators are those of Wide<T>
  const int num_tiles;                // runs of at most max_tile_heads() heads that are computed together
  const int tile_heads, wider_tiles;  // heads in a tile; the first tiles have one more
  const int num_units;                // runs of 16 tokens in a block
  const int num_words;                // 64-bit words of kept bits in a block
  const int lost_stride;              // num_units, padded to whole vectors
  const int group_shift;              // log2 of the compensation group
  const int dense_percent, still_dense_percent;

  int max_tile_heads() const { return wide ? kMaxWideTileHeads : kMaxTileHeads; }
  bool has_narrow_rows() const { return wide && D * sizeof(T) <= kNarrowRow; }
  Span span(int seq) const {
    const int n = std::max(a.seq_lens[seq], 0);
    return {a.window > 0 ? std::max(n - a.window, 0) : 0, n};
  }
  int first_block(const Span& s) const { return s.begin / B; }
  int num_blocks(const Span& s) const { return s.end > s.begin ? (s.end + B - 1) / B - s.begin / B : 0; }

  const T* page(int64_t block, int kv_head) const {
    return static_cast<const T*>(a.kv_cache) + block * a.block_stride + kv_head * a.head_stride;
  }
  const T* v_of(const T* page) const { return page + static_cast<size_t>(B) * D; }
  const T* means_of(const T* page) const { return page + static_cast<size_t>(2) * B * D; }

  Span group_of(int group, const Span& visible) const {
    return {std::max(group << group_shift, visible.begin), std::min((group + 1) << group_shift, visible.end)};
  }

  // Lays a task's buffers out in scratch memory; false when out of memory.
  bool take_scratch(Task& t, Arena& arena) const {
    const size_t heads = G, GB = heads * B, lost = heads * lost_stride, words = heads * num_words;
    const size_t lanes = static_cast<size_t>(lost_stride) * 8;
    if (!arena.reserve(Arena::bytes_for<float>(heads * D) + Arena::bytes_for<float>(heads) +
                       Arena::bytes_for<float>(lost) + Arena::bytes_for<float>(GB) * 3 +
                       Arena::bytes_for<float>(lanes) + Arena::bytes_for<int32_t>(B) +
                       Arena::bytes_for<float>(B) + Arena::bytes_for<int32_t>(heads) +
                       Arena::bytes_for<uint64_t>(words) * 2))
      return false;
    t.q = arena.take<float>(heads * D);
    t.theta = arena.take<float>(heads);
    t.lost = arena.take<float>(lost);
    std::fill_n(t.lost, lost, 0.0f);
    t.weights = arena.take<float>(GB);
    t.lost_lanes = arena.take<float>(lanes);
    t.offsets = arena.take<int32_t>(B);
    t.gathered = arena.take<float>(B);
    t.new_best = arena.take<int32_t>(heads);
    for (Block& b : t.blocks) {
      b.p = arena.take<float>(GB);
      b.kept = arena.take<uint64_t>(words);
      std::fill_n(b.kept, words, uint64_t{0});
      b.pending = false;
    }
    return true;
  }

  // Attends to blocks [begin, end) of the block table. The result is in t.state, t.acc and t.num_union.
  int32_t attend(Task& t, int begin, int end) const {
    std::fill_n(t.acc, static_cast<size_t>(G) * D, 0.0f);
    for (int g = 0; g < G; g++) t.state[g] = {-INFINITY, 0.0f, 0, -1, 0};
    prepare_query(t);
    const int32_t* table = a.block_table + t.seq * a.block_table_stride;
    if (end > a.max_blocks) return kBlockOutOfRange;
    for (int b = begin; b < end; b++)
      if (table[b] < 0 || table[b] >= a.num_blocks) return kBlockOutOfRange;
    // Whether this block is expected to read all of V, judging by the one before, be it another row's: it only decides
    // what to prefetch.
    bool expects_v = t.dense || last_read_v;
    bool was_dense = false;  // starts anew with every task, so that results do not depend on what the thread did before
    for (int b = begin; b < end; b++) {
      const T* here = page(table[b], t.kv_head);
      const T* next = page(table[b + 1 < end ? b + 1 : b], t.kv_head);
      Block& now = t.blocks[b & 1];
      now.v = v_of(here);
      const Span visible = {std::max(t.span.begin - b * B, 0), std::min(t.span.end - b * B, B)};
      Block& before = t.blocks[(b + 1) & 1];
      scores(t, here, now, visible, bytes(expects_v ? now.v : next), wide && !expects_v);
      flush(t, before);
      if (t.dense)
        dense_block(t, now, visible, next);
      else
        expects_v = was_dense = pruned_block(t, now, visible, b * B, here, next, expects_v, was_dense);
    }
    flush(t, t.blocks[0]);
    flush(t, t.blocks[1]);
    if (!t.dense) last_read_v = expects_v;
    return kOk;
  }

 private:
  int tile_begin(int tile) const { return tile * tile_heads + std::min(tile, wider_tiles); }

  void prepare_query(Task& t) const {
    const T* query = static_cast<const T*>(a.query) + t.seq * a.query_stride + static_cast<size_t>(t.kv_head) * G * D;
    const float scale = a.soft_cap > 0 ? a.sm_scale / a.soft_cap : a.sm_scale * kLog2E;
    for (int tile = 0; tile < num_tiles; tile++) {
      const int g0 = tile_begin(tile), heads = tile_begin(tile + 1) - g0;
      for (int g = 0; g < heads; g++)
        for (int d = 0; d < D; d += 16) {
          alignas(32) float x[16];
          __m256 lo, hi;
          load16_natural(query + static_cast<size_t>(g0 + g) * D + d, lo, hi);
          _mm256_store_ps(x, lo);
          _mm256_store_ps(x + 8, hi);
          for (int i = 0; i < 16; i++) t.q[static_cast<size_t>(g0) * D + (d + i) * heads + g] = x[i] * scale;
        }
    }
    for (int g = 0; g < G; g++)
      t.theta[g] = t.dense ? -INFINITY : a.theta[t.seq * a.theta_stride + t.kv_head * G + g] * kLog2E;
  }

  static const char* bytes(const void* p) { return static_cast<const char*>(p); }

  // Calls f with the tile's number of heads as a compile-time constant.
  template <class F>
  static TOPT_INLINE const char* with_heads(int heads, F&& f) {
    switch (heads) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 5: return f(std::integral_constant<int, 5>{});
      case 6: return f(std::integral_constant<int, 6>{});
      case 7: return f(std::integral_constant<int, 7>{});
      default: return f(std::integral_constant<int, 8>{});
    }
  }

  // Scores of all heads with the visible keys of a page. K is cut into chunks that stay in L1 while all heads use
  // them; the first tile of heads prefetches the chunk that follows, or the one behind it where that is `far`: AVX-512
  // is done with a chunk before the next one can arrive.
  void scores(Task& t, const T* k, Block& block, const Span& visible, const char* after, bool far) const {
    const int begin = visible.begin & ~15, end = (visible.end + 15) & ~15;
    const int wide_begin = visible.begin & ~31, wide_end = (visible.end + 31) & ~31;
    const int chunks = std::max<int>((static_cast<size_t>(D) * B * sizeof(T) + kChunkBytes - 1) / kChunkBytes, 1);
    const int step = ((D + chunks - 1) / chunks + 1) & ~1;
    for (int d = 0; d < D; d += step) {
      const int dims = std::min(step, D - d);
      const bool first = d == 0, last = d + dims == D;
      const T* chunk = k + static_cast<size_t>(d) * B;
      const int later = d + (far ? 2 : 1) * step;
      const char* ahead = later < D ? bytes(k + static_cast<size_t>(later) * B)
                                    : after + static_cast<size_t>(later - D) * B * sizeof(T);
      for (int tile = 0; tile < num_tiles; tile++) {
        const int g0 = tile_begin(tile), heads = tile_begin(tile + 1) - g0;
        const float* q = t.q + static_cast<size_t>(g0) * D + static_cast<size_t>(d) * heads;
        float* s = block.p + static_cast<size_t>(g0) * B;
        with_heads(heads, [&](auto n) {
          constexpr int GT = decltype(n)::value;
          if constexpr (GT <= kMaxTileHeads)
            if (!wide)
              return (tile == 0 ? score_chunk<T, GT, true> : score_chunk<T, GT, false>)(
                  chunk, B, q, dims, first, last, s, B, begin, end, ahead);
          return (tile == 0 ? score_chunk_avx512<T, GT, true> : score_chunk_avx512<T, GT, false>)(
              chunk, B, q, dims, first, last, s, B, wide_begin, wide_end, ahead);
        });
      }
    }
    for (int g = 0; g < G; g++) {
      float* s = block.p + static_cast<size_t>(g) * B;
      if (a.soft_cap > 0) apply_soft_cap(s, begin, end, a.soft_cap * kLog2E);
      // Slots outside the row may hold anything, NaN included.
      for (int i = begin; i < visible.begin; i++) s[i] = -INFINITY;
      for (int i = visible.end; i < end; i++) s[i] = -INFINITY;
    }
  }

  // Adds p-weighted V rows [rows.begin, rows.end) of a page for all heads.
  void weighted_rows(Task& t, const T* v, const Span& rows, const float* p, int p_stride, const char* after) const {
    const int step = std::max<int>(kChunkBytes / (D * sizeof(T)) & ~1, 2);
    for (int r = rows.begin; r < rows.end; r += step) {
      const int n = std::min(step, rows.end - r);
      const T* chunk = v + static_cast<size_t>(r) * D;
      const char* ahead = r + n == rows.end ? after : bytes(chunk + static_cast<size_t>(n) * D);
      for (int tile = 0; tile < num_tiles; tile++) {
        const int g0 = tile_begin(tile), heads = tile_begin(tile + 1) - g0;
        const float* w = p + static_cast<size_t>(g0) * p_stride + r;
        float* acc = t.acc + static_cast<size_t>(g0) * D;
        with_heads(heads, [&](auto m) {
          constexpr int GT = decltype(m)::value;
          if constexpr (GT <= kMaxTileHeads)
            if (!wide)
              return (tile == 0 ? value_chunk<T, GT, true> : value_chunk<T, GT, false>)(
                  chunk, D, n, w, p_stride, acc, ahead);
          return (tile == 0 ? value_chunk_avx512<T, GT, true> : value_chunk_avx512<T, GT, false>)(
              chunk, D, n, w, p_stride, acc, ahead);
        });
      }
    }
  }

  void raise_max(Task& t, int g, float value) const {
    HeadState& s = t.state[g];
    if (!(value > s.max)) return;
    const float factor = std::exp2(s.max - value);
    s.max = value;
    s.sum *= factor;
    scale_row(t.acc + static_cast<size_t>(g) * D, D, factor);
  }

  void dense_block(Task& t, Block& block, const Span& visible, const T* next) const {
    const int begin = visible.begin & ~15, end = (visible.end + 15) & ~15;
    for (int g = 0; g < G; g++) {
      float* s = block.p + static_cast<size_t>(g) * B;
      raise_max(t, g, max_of(s, begin, end));
      t.state[g].sum += exponentials_with<false, false>(wide, s, begin, end, t.state[g].max, 0, nullptr, nullptr,
                                                        bytes(block.v) + kChunkBytes);
      t.state[g].num_kept += visible.end - visible.begin;
    }
    t.num_union += visible.end - visible.begin;
    weighted_rows(t, block.v, visible, block.p, B, bytes(next));
  }

  // Softmax and selection of one block. Returns whether it kept so many rows that all of V was read.
  bool pruned_block(Task& t, Block& block, const Span& visible, int position, const T* here, const T* next,
                    bool expects_v, bool was_dense) const {
    const int begin = visible.begin & ~15, end = (visible.end + 15) & ~15, num_visible = visible.end - visible.begin;
    const bool partial = num_visible < B;
    int total = 0;
    bool tracks_best = false;
    for (int g = 0; g < G; g++) {
      HeadState& state = t.state[g];
      float* s = block.p + static_cast<size_t>(g) * B;
      uint64_t* kept = block.kept + g * num_words;
      const float max = max_of(s, begin, end);
      t.new_best[g] = -1;
      if (state.num_kept == 0 && max > state.max && !(max >= t.theta[g])) {
        t.new_best[g] = static_cast<int>(std::find(s + visible.begin, s + visible.end, max) - s);
        tracks_best = true;
      }
      raise_max(t, g, max);
      const char* ahead = (expects_v ? bytes(block.v) + kChunkBytes : bytes(means_of(next))) + g * num_units * 64;
      const float theta = t.theta[g];
      state.sum +=
          a.compensation
              ? exponentials_with<true, true>(wide, s, begin, end, state.max, theta, kept, t.lost_lanes, ahead)
              : exponentials_with<true, false>(wide, s, begin, end, state.max, theta, kept, nullptr, ahead);
      if (partial) hide(kept, visible);
      if (a.compensation) sum_lost(t, g, begin, end);
      int count = 0;
      for (int w = 0; w < num_words; w++) count += __builtin_popcountll(kept[w]);
      state.num_kept += count;
      total += count;
    }
    if (tracks_best) note_best(t, block, position);
    int rows = 0;
    if (total)
      for (int w = 0; w < num_words; w++) rows += __builtin_popcountll(union_word(block, w));
    t.num_union += rows;
    if (rows * 100 > num_visible * (was_dense ? still_dense_percent : dense_percent)) {
      if (a.compensation && total < num_visible * G) spread_lost_mass(t, block, visible, begin, end);
      weighted_rows(t, block.v, visible, block.p, B, bytes(next));
      return true;
    }
    if (rows) fetch_union(block);
    block.pending = rows > 0;
    if (a.compensation) compensate(t, visible, block.v, means_of(here));
    return false;
  }

  // Clears the kept bits outside the visible tokens, which include what an earlier block left there.
  void hide(uint64_t* kept, const Span& visible) const {
    for (int w = 0; w < num_words; w++) kept[w] &= bits_between(visible.begin - 64 * w, visible.end - 64 * w);
  }

  // Lost mass of every compensation group of a block, one head.
  void sum_lost(Task& t, int g, int begin, int end) const {
    const int padded = (num_units + 7) & ~7;
    if (end - begin < 16 * padded)
      for (int u = 0; u < padded; u++)
        if (16 * u < begin || 16 * u >= end) _mm256_store_ps(t.lost_lanes + 8 * u, _mm256_setzero_ps());
    float* lost = t.lost + static_cast<size_t>(g) * lost_stride;
    for (int u = 0; u < padded; u += 8) _mm256_store_ps(lost + u, transposed_sums(t.lost_lanes + 8 * u));
    const int groups = B >> group_shift, units_per_group = 1 << (group_shift - 4);
    if (units_per_group == 1) return;
    for (int i = 0; i < groups; i++) {
      float sum = lost[i * units_per_group];
      for (int u = 1; u < units_per_group; u++) sum += lost[i * units_per_group + u];
      lost[i] = sum;
    }
  }

  void note_best(Task& t, const Block& block, int position) const {
    for (int g = 0; g < G; g++) {
      const int slot = t.new_best[g];
      if (slot < 0) continue;
      t.state[g].best_pos = position + slot;
      t.state[g].best_is_kept = union_word(block, slot / 64) >> (slot % 64) & 1;
    }
  }

  uint64_t union_word(const Block& block, int w) const {
    uint64_t any = 0;
    for (int g = 0; g < G; g++) any |= block.kept[g * num_words + w];
    return any;
  }

  // Prefetches the V rows that any head keeps, all at once: spread over the next scores they would hold up its K.
  void fetch_union(const Block& block) const {
    for (int w = 0; w < num_words; w++)
      for (uint64_t any = union_word(block, w); any; any &= any - 1) {
        const T* row = block.v + static_cast<size_t>(64 * w + __builtin_ctzll(any)) * D;
        for (int d = 0; d < D; d += 64 / static_cast<int>(sizeof(T))) prefetch(bytes(row + d));
      }
  }

  // Adds the kept V rows of the block before this one. Its maximum is still the running one: this runs before the
  // next block may raise it.
  void flush(Task& t, Block& block) const {
    if (!block.pending) return;
    block.pending = false;
    for (int g = 0; g < G; g++) {
      const float* p = block.p + static_cast<size_t>(g) * B;
      int n = 0;
      for (int w = 0; w < num_words; w++)
        for (uint64_t bits = block.kept[g * num_words + w]; bits; bits &= bits - 1, n++) {
          const int slot = 64 * w + __builtin_ctzll(bits);
          t.offsets[n] = slot * D;
          t.gathered[n] = p[slot];
        }
      if (n)
        (wide ? gather_rows_avx512<T> : gather_rows<T>)(block.v, D, t.offsets, t.gathered, n,
                                                        t.acc + static_cast<size_t>(g) * D);
    }
  }

  // Adds the lost mass of every group to the weights of its visible keys in equal parts, which is the same as
  // compensating with the mean.
  void spread_lost_mass(Task& t, Block& block, const Span& visible, int begin, int end) const {
    alignas(32) float share[kMaxUnits];  // of a token in the lost mass of its group
    std::fill_n(share, num_units, 1.0f / a.group_size);
    if (visible.end - visible.begin < B)
      for (int i = begin; i < end; i += 16) {
        const Span group = group_of(i >> group_shift, visible);
        share[i / 16] = 1.0f / (group.end - group.begin);
      }
    for (int g = 0; g < G; g++)
      spread_lost(block.p + static_cast<size_t>(g) * B, begin, end, t.lost + static_cast<size_t>(g) * lost_stride,
                  group_shift, share);
  }

  // Adds lost mass times mean V: from the stored means where the row sees the whole group, else from the V rows.
  void compensate(Task& t, const Span& visible, const T* v, const T* means) const {
    const int size = a.group_size;
    const Span whole = {(visible.begin + size - 1) >> group_shift, visible.end >> group_shift};
    if (whole.begin < whole.end) weighted_rows(t, means, whole, t.lost, lost_stride, bytes(means));
    if (whole.end - whole.begin == B >> group_shift) return;
    for (int i = visible.begin >> group_shift; i * size < visible.end; i++) {
      if (i >= whole.begin && i < whole.end) continue;
      const Span part = group_of(i, visible);
      const float share = 1.0f / (part.end - part.begin);
      for (int g = 0; g < G; g++)
        std::fill(t.weights + g * B + part.begin, t.weights + g * B + part.end, t.lost[g * lost_stride + i] * share);
      weighted_rows(t, v, part, t.weights, B, bytes(v));
    }
  }
};

}  // namespace topt
