// Attention of a tile of query rows over the paged cache: scores, selection, compensation, weighted V rows.
#pragma once

#include <cmath>
#include <type_traits>

#include "arena.h"
#include "prefill_tiles_avx512.h"

namespace topt {

constexpr float kToLog2 = 1.4426950408889634f;
constexpr int kVTile = 64;           // keys in a tile of V: one word of kept bits
// A block of rows that keeps more than this part of a V tile multiplies all of it, which AVX-512 makes cheaper.
constexpr int kWholeSixteenths = 6, kWholeSixteenthsAvx512 = 3;

// Geometry of a call, and the work of one task: query tokens x heads of one kv head, heads numbered from 0.
// Row r is token r % num_tokens of head r / num_tokens: rows of one head keep about as many keys.
template <class T>
class PrefillTile {
 public:
  // Numbers of the two V tiles of a key tile, 16 bits each: a block of rows adds up both at once.
  using PerTile = uint32_t;

  // What a row knows so far. Scores are in units of log2.
  struct Row {
    float max, sum, theta;
    int32_t num_kept;
    int32_t best_pos;           // position of the best key, tracked while no key was kept
    int32_t best_tile_is_read;  // another head reads the V tile of that key
    int32_t new_best;           // slot of a new best key in this key tile, or -1
    PerTile count;              // keys kept in this key tile
  };

  struct Task {
    int seq, kv_head;
    int token;       // first token of the tile in the batch
    int num_tokens;
    int first_len;   // keys in the cache up to the first token, its own included
    int num_rows;
    const int32_t* table;  // the sequence's blocks
    float* q;              // blocks of [D][rows of the block]
    float* acc;            // [rows][D], in the order of Elem<T>::load16
    float* p;              // [rows][kKeyTile] scores, then exponentials
    float* lost;           // [rows][kUnits] lost mass of the compensation groups of the key tile
    uint64_t* kept;        // [rows][2] one bit a key
    Row* rows;
    int32_t* v_tiles;      // [num_tokens] V tiles that any head reads
    float* keys;           // [kUnits][D][16]
    float* values;         // [kKeyTile][v_stride], V tiles that a block multiplies whole
    int packed;            // V tiles that `values` holds, one bit each
    float* means;          // [groups][D]
    float* lanes;          // [kUnits][8] lost mass of one row, not yet summed
    const T** v_rows;      // [kKeyTile] V rows of the key tile
    const T** listed;      // [kKeyTile] those that a row keeps
    float* weights;        // [kKeyTile] their weights
  };

  explicit PrefillTile(const ToptPrefillArgs& args)
      : a(args),
        D(args.head_dim),
        B(args.block_size),
        G(args.num_heads / args.num_kv_heads),
        v_stride(D + 16),
        group_shift(__builtin_ctz(args.group_size)),
        num_groups(kKeyTile >> group_shift),
        avx512(args.avx512) {}

  int32_t run(Task& t, Arena& arena) const {
    t.num_rows = t.num_tokens * G;
    if (!take_scratch(t, arena)) return kOutOfMemory;
    const int begin = begin_of(t, 0), end = end_of(t, t.num_tokens - 1);
    t.table = a.block_table + t.seq * a.block_table_stride;
    if ((end + B - 1) / B > a.max_blocks) return kBlockOutOfRange;
    for (int b = begin / B; b * B < end; b++)
      if (t.table[b] < 0 || t.table[b] >= a.num_blocks) return kBlockOutOfRange;
    prepare(t);
    for (int position = begin / kKeyTile * kKeyTile; position < end; position += kKeyTile) key_tile(t, position);
    for (int i = 0; i < t.num_tokens; i++) finish(t, i);
    return kOk;
  }

 private:
  struct Span {
    int begin, end;
    int size() const { return std::max(end - begin, 0); }
    Span clipped(int from, int to) const { return {std::max(begin, from), std::min(end, to)}; }
  };

  const ToptPrefillArgs& a;
  const int D, B, G;
  const int v_stride;     // padded, so that a column of V does not fall into few cache sets
  const int group_shift;  // log2 of the compensation group
  const int num_groups;   // in a key tile
  const bool avx512;      // the CPU has it

  // Keys [begin, end) that a token sees.
  int end_of(const Task& t, int token) const { return t.first_len + token; }
  int begin_of(const Task& t, int token) const { return a.window > 0 ? std::max(end_of(t, token) - a.window, 0) : 0; }
  // The same as slots of the key tile at a position.
  Span slots(const Task& t, int token, int position) const {
    return {std::max(begin_of(t, token) - position, 0), std::min(end_of(t, token) - position, kKeyTile)};
  }
  static PerTile per_tile(const Span& slots) {
    return slots.clipped(0, kVTile).size() | slots.clipped(kVTile, kKeyTile).size() << 16;
  }
  Span group_of(int group, const Span& visible) const {
    return {std::max(group << group_shift, visible.begin), std::min((group + 1) << group_shift, visible.end)};
  }
  const T* page_of(const Task& t, int position) const {
    return static_cast<const T*>(a.kv_cache) + t.table[position / B] * a.block_stride + t.kv_head * a.head_stride;
  }
  const T* v_row(const Task& t, int position) const {
    return page_of(t, position) + static_cast<size_t>(B + position % B) * D;
  }
  const T* mean_row(const Task& t, int position) const {
    return page_of(t, position) + static_cast<size_t>(2 * B + (position % B >> group_shift)) * D;
  }

  bool take_scratch(Task& t, Arena& arena) const {
    const size_t rows = t.num_rows, row_floats = rows * D;
    const auto f = [](size_t n) { return Arena::bytes_for<float>(n); };
    if (!arena.reserve(2 * f(row_floats) + f(rows * kKeyTile) + f(rows * kUnits) +
                       Arena::bytes_for<uint64_t>(rows * 2) + Arena::bytes_for<Row>(rows) +
                       Arena::bytes_for<int32_t>(t.num_tokens) + f(kKeyTile * D) + f(kKeyTile * v_stride) +
                       f(kUnits * D) + f(kUnits * 8) + 2 * Arena::bytes_for<const T*>(kKeyTile) + f(kKeyTile)))
      return false;
    t.q = arena.take<float>(row_floats);
    t.acc = arena.take<float>(row_floats);
    t.p = arena.take<float>(rows * kKeyTile);
    t.lost = arena.take<float>(rows * kUnits);
    t.kept = arena.take<uint64_t>(rows * 2);
    t.rows = arena.take<Row>(rows);
    t.v_tiles = arena.take<int32_t>(t.num_tokens);
    t.keys = arena.take<float>(kKeyTile * D);
    t.values = arena.take<float>(kKeyTile * v_stride);
    t.means = arena.take<float>(kUnits * D);
    t.lanes = arena.take<float>(kUnits * 8);
    t.v_rows = arena.take<const T*>(kKeyTile);
    t.listed = arena.take<const T*>(kKeyTile);
    t.weights = arena.take<float>(kKeyTile);
    return true;
  }

  static int block_rows(const Task& t, int first) { return std::min(kRowBlock, t.num_rows - first); }

  // Calls f with the number of rows of a block as a compile-time constant.
  template <class F>
  static TOPT_INLINE void with_rows(int rows, F&& f) {
    switch (rows) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 5: return f(std::integral_constant<int, 5>{});
      default: return f(std::integral_constant<int, kRowBlock>{});
    }
  }

  // acc += p v for n rows.
  void add_values(int n, const float* v, int v_stride, int num_keys, const float* p, int p_stride, float* acc) const {
    with_rows(n, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      (avx512 ? value_block_avx512<kRows> : value_block<kRows>)(v, v_stride, num_keys, p, p_stride, acc, D);
    });
  }

  void prepare(Task& t) const {
    const float scale = a.soft_cap > 0 ? a.sm_scale / a.soft_cap : a.sm_scale * kToLog2;
    std::fill_n(t.acc, static_cast<size_t>(t.num_rows) * D, 0.0f);
    std::fill_n(t.v_tiles, t.num_tokens, 0);
    // Without compensation it is never written, and 0 times what an earlier call left there may be NaN.
    std::fill_n(t.lost, static_cast<size_t>(t.num_rows) * kUnits, 0.0f);
    std::fill_n(t.lanes, kUnits * 8, 0.0f);
    for (int r = 0; r < t.num_rows; r++) {
      const int64_t token = t.token + r % t.num_tokens;
      const int head = t.kv_head * G + r / t.num_tokens, first = r - r % kRowBlock, width = block_rows(t, first);
      const T* query = static_cast<const T*>(a.query) + token * a.query_stride + static_cast<size_t>(head) * D;
      float* q = t.q + static_cast<size_t>(first) * D + (r - first);
      for (int d = 0; d < D; d += 16) {
        alignas(32) float x[16];
        __m256 lo, hi;
        load16_natural(query + d, lo, hi);
        _mm256_store_ps(x, lo);
        _mm256_store_ps(x + 8, hi);
        for (int i = 0; i < 16; i++) q[static_cast<size_t>(d + i) * width] = x[i] * scale;
      }
      const float theta = a.dense[token] ? -INFINITY : a.theta[token * a.theta_stride + head] * kToLog2;
      t.rows[r] = {-INFINITY, 0.0f, theta, 0, -1, 0, -1, 0};
    }
  }

  void key_tile(Task& t, int position) const {
    const Span all = {slots(t, 0, position).begin, slots(t, t.num_tokens - 1, position).end};
    const bool partial = slots(t, 0, position).end < kKeyTile || slots(t, t.num_tokens - 1, position).begin > 0;
    load_tile(t, position, all);
    if (partial) {
      std::fill_n(t.kept, static_cast<size_t>(t.num_rows) * 2, uint64_t{0});
      std::fill_n(t.lost, static_cast<size_t>(t.num_rows) * kUnits, 0.0f);
    }
    const int end_unit = (all.end + 15) / 16;
    for (int u = all.begin / 16, width; u < end_unit; u += width) {
      width = avx512 && u + 1 < end_unit ? 2 : 1;
      for (int first = 0; first < t.num_rows; first += kRowBlock) {
        const int n = block_rows(t, first);
        if (partial && !any_sees(t, first, n, position + 16 * u, 16 * width)) continue;
        float* s = t.p + static_cast<size_t>(first) * kKeyTile + 16 * u;
        const float *panel = t.keys + static_cast<size_t>(u) * 16 * D, *q = t.q + static_cast<size_t>(first) * D;
        with_rows(n, [&](auto rows) {
          (width == 2 ? score_pair_avx512<decltype(rows)::value> : score_block<decltype(rows)::value>)(panel, q, D, s);
        });
      }
    }
    for (int first = 0; first < t.num_rows; first += kRowBlock) {
      const int n = block_rows(t, first);
      PerTile kept = 0, seen = 0;
      for (int r = first; r < first + n; r++) {
        const Span visible = partial ? slots(t, r % t.num_tokens, position) : Span{0, kKeyTile};
        Row& row = t.rows[r];
        row.new_best = -1;
        if (visible.size() == 0) continue;
        select(t, r, visible);
        kept += row.count;
        seen += per_tile(visible);
      }
      int whole = 0, rest = 0;  // V tiles that the block multiplies whole, and the others that it sees: one bit each
      for (int w = 0; w < 2; w++) {
        const int keeps = kept >> 16 * w & 0xffff, sees = seen >> 16 * w & 0xffff;
        (keeps * 16 > sees * (avx512 ? kWholeSixteenthsAvx512 : kWholeSixteenths) ? whole : rest) |= (sees > 0) << w;
      }
      if (whole) add_all_values(t, first, n, position, all, whole, rest);
      if (rest) add_kept_values(t, first, n, position, partial, rest);
    }
    count_v_tiles(t, position);
  }

  // Whether any of n rows sees one of some keys at a position.
  bool any_sees(const Task& t, int first, int n, int position, int num_keys) const {
    for (int r = first; r < first + n; r++) {
      const Span visible = slots(t, r % t.num_tokens, position);
      if (visible.begin < num_keys && visible.end > 0) return true;
    }
    return false;
  }

  // Packs K and the means of the key tile. Only slots that some row sees are read: the others may hold anything.
  void load_tile(Task& t, int position, const Span& all) const {
    t.packed = 0;
    for (int u = all.begin / 16; u * 16 < all.end; u++) {
      const int at = position + 16 * u;
      pack_keys(page_of(t, at) + at % B, B, D, t.keys + static_cast<size_t>(u) * 16 * D);
      const T* v = v_row(t, at);
      for (int i = 0; i < 16; i++) t.v_rows[16 * u + i] = v + static_cast<size_t>(i) * D;
    }
    if (!a.compensation) return;
    for (int i = 0; i < num_groups; i++) {
      const int begin = position + (i << group_shift), end = begin + a.group_size;
      // The first token that sees the end of the group is the one that may still see all of it.
      const int token = std::max(end - t.first_len, 0);
      float* row = t.means + static_cast<size_t>(i) * D;
      if (token < t.num_tokens && begin_of(t, token) <= begin)
        pack_row(mean_row(t, begin), D, row);
      else
        std::fill_n(row, D, 0.0f);
    }
  }

  // Softmax and selection of one row in a key tile.
  void select(Task& t, int r, const Span& visible) const {
    Row& row = t.rows[r];
    const int begin = visible.begin & ~15, end = (visible.end + 15) & ~15;
    float* s = t.p + static_cast<size_t>(r) * kKeyTile;
    uint64_t* kept = t.kept + 2 * r;
    if (a.soft_cap > 0) apply_soft_cap(s, begin, end, a.soft_cap * kToLog2);
    for (int i = begin; i < visible.begin; i++) s[i] = -INFINITY;
    for (int i = visible.end; i < end; i++) s[i] = -INFINITY;
    const float max = max_of(s, begin, end);
    if (row.theta == -INFINITY) {
      raise_max(t, r, max);
      row.sum += exponentials_of<false, false>(s, begin, end, row, nullptr, nullptr);
      for (int w = 0; w < 2; w++) kept[w] = bits_between(visible.begin - 64 * w, visible.end - 64 * w);
      row.count = per_tile(visible);
      std::fill_n(t.lost + r * kUnits, kUnits, 0.0f);
      row.num_kept += visible.size();
      return;
    }
    if (row.num_kept == 0 && max > row.max && !(max >= row.theta))
      row.new_best = static_cast<int>(std::find(s + visible.begin, s + visible.end, max) - s);
    raise_max(t, r, max);
    row.sum += a.compensation
                   ? exponentials_of<true, true>(s, begin, end, row, kept, t.lanes)
                   : exponentials_of<true, false>(s, begin, end, row, kept, nullptr);
    if (visible.size() < kKeyTile)
      for (int w = 0; w < 2; w++) kept[w] &= bits_between(visible.begin - 64 * w, visible.end - 64 * w);
    if (a.compensation) sum_lost(t, r, begin, end);
    const int low = __builtin_popcountll(kept[0]), high = __builtin_popcountll(kept[1]);
    row.count = low | high << 16;
    row.num_kept += low + high;
  }

  template <bool PRUNE, bool LOST>
  float exponentials_of(float* s, int begin, int end, const Row& row, uint64_t* kept, float* lost) const {
    const char* ahead = reinterpret_cast<const char*>(s);  // nothing to prefetch
    return exponentials_with<PRUNE, LOST>(avx512, s, begin, end, row.max, row.theta, kept, lost, ahead);
  }

  void raise_max(Task& t, int r, float value) const {
    Row& row = t.rows[r];
    if (!(value > row.max)) return;
    const float factor = std::exp2(row.max - value);
    row.max = value;
    row.sum *= factor;
    scale_row(t.acc + static_cast<size_t>(r) * D, D, factor);
  }

  // Lost mass of every compensation group of the key tile, one row.
  void sum_lost(Task& t, int r, int begin, int end) const {
    for (int u = 0; u < begin / 16; u++) _mm256_store_ps(t.lanes + 8 * u, _mm256_setzero_ps());
    for (int u = end / 16; u < kUnits; u++) _mm256_store_ps(t.lanes + 8 * u, _mm256_setzero_ps());
    float* lost = t.lost + r * kUnits;
    _mm256_store_ps(lost, transposed_sums(t.lanes));
    const int width = 1 << (group_shift - 4);
    if (width == 1) return;
    for (int i = 0; i < num_groups; i++) {
      float sum = lost[i * width];
      for (int u = 1; u < width; u++) sum += lost[i * width + u];
      lost[i] = sum;
    }
  }

  // Multiplies whole V tiles: weights are zero where not kept, plus the group's lost mass in equal parts, which is the
  // same as compensating with the mean. A group that reaches into `rest` is left to its mean.
  void add_all_values(Task& t, int first, int n, int position, const Span& all, int whole, int rest) const {
    Span part = {kKeyTile, 0};  // what the block sees of these tiles
    for (int r = first; r < first + n; r++) {
      const Span visible = slots(t, r % t.num_tokens, position);
      if (visible.size() == 0) continue;
      part = {std::min(part.begin, visible.begin), std::max(part.end, visible.end)};
    }
    part = part.clipped(whole & 1 ? 0 : kVTile, whole & 2 ? kKeyTile : kVTile);
    load_values(t, all, whole & ~t.packed);
    const bool spreads = a.compensation && !(rest && a.group_size > kVTile);
    for (int r = first; r < first + n; r++) {
      const Span visible = slots(t, r % t.num_tokens, position);
      const Span own = visible.clipped(part.begin, part.end);
      float* p = t.p + static_cast<size_t>(r) * kKeyTile;
      if (spreads && own.size() && t.rows[r].count != per_tile(visible)) {
        float share[kUnits];
        for (int u = own.begin / 16; 16 * u < own.end; u++)
          share[u] = 1.0f / group_of(16 * u >> group_shift, visible).size();
        spread_lost(p, own.begin & ~15, (own.end + 15) & ~15, t.lost + r * kUnits, group_shift, share);
      }
      if (own.size() == 0) {
        std::fill(p + part.begin, p + part.end, 0.0f);
        continue;
      }
      std::fill(p + part.begin, p + own.begin, 0.0f);
      std::fill(p + own.end, p + part.end, 0.0f);
    }
    const float* v = t.values + static_cast<size_t>(part.begin) * v_stride;
    const float* p = t.p + static_cast<size_t>(first) * kKeyTile + part.begin;
    float* acc = t.acc + static_cast<size_t>(first) * D;
    add_values(n, v, v_stride, part.size(), p, kKeyTile, acc);
  }

  // Packs V tiles: of their rows only those that some query row sees.
  void load_values(Task& t, const Span& all, int tiles) const {
    for (int w = 0; w < 2; w++) {
      if (!(tiles >> w & 1)) continue;
      const Span tile = all.clipped(kVTile * w, kVTile * (w + 1));
      for (int i = tile.begin; i < tile.end; i++)
        pack_row(t.v_rows[i], D, t.values + static_cast<size_t>(i) * v_stride);
    }
    t.packed |= tiles;
  }

  // Adds the V rows that are kept, and compensates with means: of the V tiles in `rest`, one bit each.
  void add_kept_values(Task& t, int first, int n, int position, bool partial, int rest) const {
    const bool wide = a.group_size > kVTile;
    const Span groups = {wide || rest & 1 ? 0 : num_groups / 2, wide || rest & 2 ? num_groups : num_groups / 2};
    for (int r = first; r < first + n; r++) {
      const float* p = t.p + static_cast<size_t>(r) * kKeyTile;
      float* acc = t.acc + static_cast<size_t>(r) * D;
      const uint64_t kept[2] = {rest & 1 ? t.kept[2 * r] : 0, rest & 2 ? t.kept[2 * r + 1] : 0};
      if (kept[0] | kept[1]) add_kept_rows(t, kept, p, acc);
      if (partial && a.compensation) compensate_parts(t, r, slots(t, r % t.num_tokens, position), groups);
    }
    if (!a.compensation) return;
    const float* means = t.means + static_cast<size_t>(groups.begin) * D;
    const float* lost = t.lost + static_cast<size_t>(first) * kUnits + groups.begin;
    float* acc = t.acc + static_cast<size_t>(first) * D;
    add_values(n, means, D, groups.size(), lost, kUnits, acc);
  }

  // acc += p v for the keys whose bits are set.
  void add_kept_rows(Task& t, const uint64_t (&kept)[2], const float* p, float* acc) const {
    if (avx512 && D % 32 == 0) return kept_rows_avx512(t.v_rows, D, kept, p, acc);
    int found = 0;
    for (int w = 0; w < 2; w++)
      for (uint64_t bits = kept[w]; bits; bits &= bits - 1, found++) {
        const int slot = 64 * w + __builtin_ctzll(bits);
        t.listed[found] = t.v_rows[slot];
        t.weights[found] = p[slot];
      }
    listed_rows(t.listed, D, t.weights, found, acc);
  }

  // Compensates groups that a row sees in part from the V rows that it sees, and takes them off the list.
  void compensate_parts(Task& t, int r, const Span& visible, const Span& groups) const {
    for (int i = std::max(visible.begin >> group_shift, groups.begin); i < groups.end; i++) {
      const Span part = group_of(i, visible);
      float& lost = t.lost[r * kUnits + i];
      if (part.size() == 0) break;
      if (part.size() == a.group_size || lost == 0) continue;
      std::fill_n(t.weights, part.size(), lost / part.size());
      listed_rows(t.v_rows + part.begin, D, t.weights, part.size(), t.acc + static_cast<size_t>(r) * D);
      lost = 0;
    }
  }

  // Notes which V tiles a token's heads read together, and whether best keys lie in one of them.
  void count_v_tiles(Task& t, int position) const {
    for (int i = 0; i < t.num_tokens; i++) {
      uint64_t any[2] = {0, 0};
      for (int r = i; r < t.num_rows; r += t.num_tokens)
        for (int w = 0; w < 2; w++) any[w] |= t.kept[2 * r + w];
      t.v_tiles[i] += (any[0] != 0) + (any[1] != 0);
      for (int r = i; r < t.num_rows; r += t.num_tokens) {
        Row& row = t.rows[r];
        if (row.new_best < 0) continue;
        row.best_pos = position + row.new_best;
        row.best_tile_is_read = any[row.new_best / kVTile] != 0;
      }
    }
  }

  void finish(Task& t, int i) const {
    const int64_t token = t.token + i;
    for (int g = 0; g < G; g++) {
      const int r = g * t.num_tokens + i, head = t.kv_head * G + g;
      Row& row = t.rows[r];
      float* total = t.q;  // the queries are no longer needed: [D], natural order
      for (int d = 0; d < D; d += 16) {
        const float* acc = t.acc + static_cast<size_t>(r) * D + d;
        __m256 x = _mm256_load_ps(acc), y = _mm256_load_ps(acc + 8);
        Elem<T>::unpermute(x, y);
        _mm256_store_ps(total + d, x);
        _mm256_store_ps(total + d + 8, y);
      }
      const bool lacks_best = row.num_kept == 0 && row.best_pos >= 0;
      if (lacks_best) keep_best(t, i, row.best_pos, total);
      a.num_kept[token * a.num_heads + head] = row.num_kept + lacks_best;
      float factor = 1.0f, sum = row.sum;
      if (a.sinks) {
        const float sink = a.sinks[head] * kToLog2, max = std::max(row.max, sink);
        factor = std::exp2(row.max - max);
        sum = sum * factor + std::exp2(sink - max);
      }
      const __m256 scale = _mm256_set1_ps(factor / sum);
      T* out = static_cast<T*>(a.out) + token * a.out_stride + static_cast<size_t>(head) * D;
      for (int d = 0; d < D; d += 16)
        Elem<T>::store16(out + d, _mm256_mul_ps(scale, _mm256_load_ps(total + d)),
                         _mm256_mul_ps(scale, _mm256_load_ps(total + d + 8)));
    }
    // Heads that kept nothing read the tile of their best key, each tile once.
    int v_tiles = t.v_tiles[i];
    for (int g = 0; g < G; g++) {
      const Row& row = t.rows[g * t.num_tokens + i];
      bool is_new = row.num_kept == 0 && row.best_pos >= 0 && !row.best_tile_is_read;
      for (int h = 0; h < g && is_new; h++) {
        const Row& other = t.rows[h * t.num_tokens + i];
        is_new = other.num_kept > 0 || other.best_pos / kVTile != row.best_pos / kVTile;
      }
      v_tiles += is_new;
    }
    a.v_tiles_read[token * a.num_kv_heads + t.kv_head] = v_tiles;
  }

  // Gives a row that kept nothing its best key back, and takes it out of the lost mass of its group. The best key's
  // exponential is 1: its score is the maximum.
  void keep_best(const Task& t, int i, int position, float* total) const {
    add_scaled(total, v_row(t, position), D, 1.0f);
    if (!a.compensation) return;
    const Span visible = {begin_of(t, i), end_of(t, i)};
    const Span group = group_of(position >> group_shift, visible);
    if (group.size() == a.group_size) {
      add_scaled(total, mean_row(t, group.begin), D, -1.0f);
      return;
    }
    for (int at = group.begin; at < group.end; at++) add_scaled(total, v_row(t, at), D, -1.0f / group.size());
  }
};

}  // namespace topt
