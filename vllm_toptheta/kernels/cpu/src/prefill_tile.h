// Attention of a tile of query tokens over the paged cache: scores, selection, weighted V rows, compensation.
#pragma once

#include <cmath>
#include <numeric>

#include "arena.h"
#include "prefill_args.h"
#include "prefill_task.h"

namespace topt {

constexpr float kToLog2 = 1.4426950408889634f;
// Tokens that together keep more than this part of a V tile multiply all of it.
constexpr int kWholeSixteenths = 9, kWholeSixteenthsAvx512 = 5;

// Geometry of a call, and the work of one task: query tokens x heads of one kv head, heads numbered from 0.
// Row r is head r % G of token r / G.
//
// The keys come in tiles at absolute positions: the first of the sequence, the one that holds the tokens themselves,
// then the others from the front. A key is tested against the denominator up to and including its own tile. All tokens
// of a task lie in one key tile, so a row meets the same tiles in the same order whatever chunk it came in.
template <class T>
class PrefillTile {
 public:
  using Task = PrefillTask<T>;
  using Row = PrefillRow;
  using Token = PrefillToken;

  explicit PrefillTile(const ToptPrefillArgs& args)
      : a(args),
        D(args.head_dim),
        B(args.block_size),
        G(args.num_heads / args.num_kv_heads),
        unit_tokens(kRowBlock / std::gcd(kRowBlock, G)),
        v_stride(D + 16),
        group_shift(__builtin_ctz(args.group_size)),
        num_groups(kKeyTile >> group_shift),
        natural(args.amx != 0),
        avx512(args.avx512 != 0) {}

  int32_t run(Task& t, Arena& arena) const {
    t.num_rows = t.num_tokens * G;
    if (!take_scratch(t, arena)) return kOutOfMemory;
    const int begin = begin_of(t, 0), end = end_of(t, t.num_tokens - 1);
    t.table = a.block_table + t.seq * a.block_table_stride;
    if ((end + B - 1) / B > a.max_blocks) return kBlockOutOfRange;
    for (int b = begin / B; b * B < end; b++)
      if (t.table[b] < 0 || t.table[b] >= a.num_blocks) return kBlockOutOfRange;
    prepare(t);
    const int own = (t.first_len - 1) / kKeyTile * kKeyTile, rest = std::max(begin / kKeyTile, 1) * kKeyTile;
    if (begin < kKeyTile && own > 0) key_tile(t, 0, own);
    key_tile(t, own, rest);
    for (int at = rest; at < own; at += kKeyTile) key_tile(t, at, at + kKeyTile);
    for (int i = 0; i < t.num_tokens; i++) finish(t, i);
    return kOk;
  }

 private:
  struct Span {
    int begin, end;
    int size() const { return std::max(end - begin, 0); }
  };

  const ToptPrefillArgs& a;
  const int D, B, G;
  const int unit_tokens;  // whose rows are whole blocks
  const int v_stride;     // padded, so that a column of V does not fall into few cache sets
  const int group_shift;  // log2 of the compensation group
  const int num_groups;   // in a key tile
  const bool natural;     // order of `acc`; else that of Elem<T>::load16
  const bool avx512;      // the CPU has it

  // Keys [begin, end) that a token sees.
  int end_of(const Task& t, int token) const { return t.first_len + token; }
  int begin_of(const Task& t, int token) const { return a.window > 0 ? std::max(end_of(t, token) - a.window, 0) : 0; }
  // The same as slots of the key tile at a position.
  Span slots(const Task& t, int token, int position) const {
    return {std::max(begin_of(t, token) - position, 0), std::min(end_of(t, token) - position, kKeyTile)};
  }
  static void set_bits(KeyBits& bits, int begin, int end) {
    for (int w = 0; w < 2; w++) bits[w] |= bits_between(begin - kVTile * w, end - kVTile * w);
  }

  const T* page_of(const Task& t, int position) const {
    return static_cast<const T*>(a.kv_cache) + t.table[position / B] * a.block_stride + t.kv_head * a.head_stride;
  }
  const T* mean_row(const Task& t, int position) const {
    return page_of(t, position) + static_cast<size_t>(2 * B + (position % B >> group_shift)) * D;
  }

  bool take_scratch(Task& t, Arena& arena) const {
    const size_t rows = t.num_rows, row_floats = rows * D;
    const auto f = [](size_t n) { return Arena::bytes_for<float>(n); };
    if (!arena.reserve(Arena::bytes_for<Token>(t.num_tokens) + Arena::bytes_for<Row>(rows) + 2 * f(row_floats) +
                       f(rows * kWeights) + f(kUnits * 8) + f(G) + f(kKeyTile * D) + f(kWeights * v_stride)))
      return false;
    t.tokens = arena.take<Token>(t.num_tokens);
    t.rows = arena.take<Row>(rows);
    t.q = arena.take<float>(row_floats);
    t.acc = arena.take<float>(row_floats);
    t.p = arena.take<float>(rows * kWeights);
    t.lanes = arena.take<float>(kUnits * 8);
    t.limits = arena.take<float>(G);
    t.keys = arena.take<float>(kKeyTile * D);
    t.values = arena.take<float>(kWeights * v_stride);
    return true;
  }

  // Calls f(first, n) for rows [begin, end) in blocks, n a compile-time constant.
  template <class F>
  static TOPT_INLINE void in_blocks(int begin, int end, F&& f) {
    for (int first = begin; first < end; first += kRowBlock) {
      switch (end - first) {
        case 1: f(first, std::integral_constant<int, 1>{}); break;
        case 2: f(first, std::integral_constant<int, 2>{}); break;
        case 3: f(first, std::integral_constant<int, 3>{}); break;
        case 4: f(first, std::integral_constant<int, 4>{}); break;
        case 5: f(first, std::integral_constant<int, 5>{}); break;
        default: f(first, std::integral_constant<int, kRowBlock>{});
      }
    }
  }

  void prepare(Task& t) const {
    const float scale = a.soft_cap > 0 ? a.sm_scale / a.soft_cap : a.sm_scale * kToLog2;
    std::fill_n(t.acc, static_cast<size_t>(t.num_rows) * D, 0.0f);
    for (int i = 0; i < t.num_tokens; i++) {
      const int64_t token = t.token + i;
      const float limit = a.log_min_prob[token * a.log_min_prob_stride + t.kv_head];
      t.tokens[i] = {std::exp2(limit * kToLog2), a.dense[token] != 0, false, 0, 0, {}, {}};
      for (int g = 0; g < G; g++) {
        const int r = i * G + g, head = t.kv_head * G + g, first = r - r % kRowBlock;
        const int width = std::min(kRowBlock, t.num_rows - first);
        const T* query = static_cast<const T*>(a.query) + token * a.query_stride + static_cast<size_t>(head) * D;
        float* q = t.q + static_cast<size_t>(first) * D + (r - first);
        for (int d = 0; d < D; d += 16) {
          alignas(32) float x[16];
          __m256 lo, hi;
          load16_natural(query + d, lo, hi);
          _mm256_store_ps(x, lo);
          _mm256_store_ps(x + 8, hi);
          for (int j = 0; j < 16; j++) q[static_cast<size_t>(d + j) * width] = x[j] * scale;
        }
        const float sink = a.sinks ? a.sinks[head] * kToLog2 : -INFINITY;
        t.rows[r] = {sink, 0.0f, sink > -INFINITY ? 1.0f : 0.0f, 0.0f, 0.0f};
      }
    }
  }

  // One key tile; `next` is the position of the one behind it.
  void key_tile(Task& t, int position, int next) const {
    const Span first = slots(t, 0, position), last = slots(t, t.num_tokens - 1, position);
    const Span all = {first.begin, last.end};
    const bool partial = first.end < kKeyTile || last.begin > 0;
    load_tile(t, position, all);
    const int end_unit = (all.end + 15) / 16;
    for (int u = all.begin / 16, width; u < end_unit; u += width) {
      width = avx512 && u + 1 < end_unit ? 2 : 1;
      const float* panel = t.keys + static_cast<size_t>(u) * 16 * D;
      in_blocks(0, t.num_rows, [&](int row, auto n) {
        constexpr int kRows = decltype(n)::value;
        for (int i = u; i < u + width; i++) fetch_keys(t, next + 16 * i, row, n);
        if (partial && !any_sees(t, row, n, position + 16 * u, 16 * width)) return;
        const float* q = t.q + static_cast<size_t>(row) * D;
        float* s = weights_of(t, row) + 16 * u;
        (width == 2 ? score_pair_avx512<kRows> : score_block<kRows>)(panel, q, D, s);
      });
    }
    const auto weigh_unit = [&](int begin) {
      for (int i = begin; i < std::min(begin + unit_tokens, t.num_tokens); i++) weigh(t, i, position, partial);
    };
    weigh_unit(0);
    for (int begin = 0; begin < t.num_tokens; begin += unit_tokens) {
      weigh_unit(begin + unit_tokens);  // one ahead, so that its V rows are on their way
      add_unit(t, begin, std::min(begin + unit_tokens, t.num_tokens));
    }
  }

  void add_unit(Task& t, int begin, int end) const {
    bool whole[2];
    for (int w = 0; w < 2; w++) {
      int keeps = 0, sees = 0;
      for (int i = begin; i < end; i++) {
        keeps += __builtin_popcountll(t.tokens[i].kept[w]);
        sees += __builtin_popcountll(t.tokens[i].seen[w]);
      }
      whole[w] = keeps * 16 > sees * (avx512 ? kWholeSixteenthsAvx512 : kWholeSixteenths);
      if (whole[w]) add_whole(t, begin, end, w);
    }
    for (int i = begin; i < end; i++) add_listed(t, i, whole);
  }

  // Fetches a part of the 16 keys at a position, as much as n of the rows are of all.
  void fetch_keys(const Task& t, int position, int row, int n) const {
    if (position >= end_of(t, t.num_tokens - 1)) return;
    const T* k = page_of(t, position) + static_cast<size_t>(position % B) * (a.amx ? D : 1);
    for (int d = row * D / t.num_rows; d < (row + n) * D / t.num_rows; d++)
      _mm_prefetch(reinterpret_cast<const char*>(k + static_cast<size_t>(d) * (a.amx ? 16 : B)), _MM_HINT_T1);
  }

  // Fetches V rows whose bits are set.
  void fetch_values(Task& t, int w, uint64_t bits) const {
    bits &= ~t.wanted[w];
    t.wanted[w] |= bits;
    if (a.amx) return;
    for (; bits; bits &= bits - 1) {
      const int key = kVTile * w + __builtin_ctzll(bits);
      const char* row = reinterpret_cast<const char*>(t.v_units[key / 16] + static_cast<size_t>(key % 16) * D);
      for (size_t i = 0; i < D * sizeof(T); i += 64) _mm_prefetch(row + i, _MM_HINT_T1);
    }
  }

  // Whether any of n rows sees one of some keys at a position.
  bool any_sees(const Task& t, int row, int n, int position, int num_keys) const {
    for (int i = row / G; i <= (row + n - 1) / G; i++) {
      const Span visible = slots(t, i, position);
      if (visible.begin < num_keys && visible.end > 0) return true;
    }
    return false;
  }

  float* acc_of(const Task& t, int row) const { return t.acc + static_cast<size_t>(row) * D; }
  float* weights_of(const Task& t, int row) const { return t.p + static_cast<size_t>(row) * kWeights; }

  // Packs K and the means of the key tile. Only slots that some row sees are read: the others may hold anything.
  void load_tile(Task& t, int position, const Span& all) const {
    t.packed[0] = t.packed[1] = t.wanted[0] = t.wanted[1] = 0;
    for (int u = all.begin / 16; u * 16 < all.end; u++) {
      const int at = position + 16 * u, slot = at % B;
      const T *page = page_of(t, at), *v = page + static_cast<size_t>(B) * D;
      float* panel = t.keys + static_cast<size_t>(u) * 16 * D;
      if constexpr (std::is_same_v<T, bf16>)
        if (a.amx) {
          t.v_units[u] = v + slot * 16;
          pack_keys_amx(page + static_cast<size_t>(slot) * D, D, panel);
          continue;
        }
      t.v_units[u] = v + static_cast<size_t>(slot) * D;
      pack_keys(page + slot, B, D, panel);
    }
    for (int i = 0; i < num_groups; i++) {
      const int begin = position + (i << group_shift), end = begin + a.group_size;
      // The first token that sees the end of the group is the one that may still see all of it.
      const int token = std::max(end - t.first_len, 0);
      float* row = t.values + static_cast<size_t>(kKeyTile + i) * v_stride;
      if (token < t.num_tokens && begin_of(t, token) <= begin)
        pack_row(mean_row(t, begin), D, natural, row);
      else
        std::fill_n(row, D, 0.0f);
    }
  }

  // Packs the V rows whose bits are set.
  void load_values(Task& t, int w, uint64_t wanted) const {
    wanted &= ~t.packed[w];
    t.packed[w] |= wanted;
    for (; wanted; wanted &= wanted - 1) {
      const int key = kVTile * w + __builtin_ctzll(wanted), i = key % 16;
      float* row = t.values + static_cast<size_t>(key) * v_stride;
      if constexpr (std::is_same_v<T, bf16>)
        if (a.amx) {
          pack_row_amx(t.v_units[key / 16] + i / 2 * 32, 16 * B, i % 2 != 0, D, row);
          continue;
        }
      pack_row(t.v_units[key / 16] + static_cast<size_t>(i) * D, D, natural, row);
    }
  }

  // Softmax of one token's rows in a key tile, and which keys they keep. Leaves the masses of the groups as lost.
  void weigh(Task& t, int i, int position, bool partial) const {
    Token& token = t.tokens[i];
    const Span visible = partial ? slots(t, i, position) : Span{0, kKeyTile};
    for (int w = 0; w < 2; w++) token.seen[w] = token.kept[w] = 0;
    token.lacks = false;
    if (visible.size() == 0) return;
    set_bits(token.seen, visible.begin, visible.end);
    const int begin = visible.begin & ~15, end = (visible.end + 15) & ~15;
    for (int g = 0; g < G; g++) {
      Row& row = t.rows[i * G + g];
      float* s = weights_of(t, i * G + g);
      if (a.soft_cap > 0) apply_soft_cap(s, begin, end, a.soft_cap * kToLog2);
      std::fill(s + begin, s + visible.begin, -INFINITY);
      std::fill(s + visible.end, s + end, -INFINITY);
      raise_max(t, i * G + g, max_of(s, begin, end));
      if (token.dense) {
        row.in_tile = exponentials<false>(s, begin, end, row.max, nullptr);
      } else {
        row.in_tile = exponentials<true>(s, begin, end, row.max, t.lanes);
        sum_groups(t.lanes, begin, end, s + kKeyTile);
      }
      row.sum += row.in_tile;
      t.limits[g] = (row.sum + row.sink) * token.min_prob;
      std::fill(s + begin, s + visible.begin, 0.0f);
      std::fill(s + visible.end, s + end, 0.0f);
    }
    if (!token.dense) {
      reaching(weights_of(t, i * G), G, t.limits, begin, end, token.kept);
      if (partial) keep_parts(token, visible);
      for (int w = 0; w < 2; w++) {
        token.kept[w] &= token.seen[w];
        token.lacks |= token.kept[w] != token.seen[w];
      }
    }
    if (!token.lacks) {
      for (int w = 0; w < 2; w++) token.kept[w] = token.seen[w];
      for (int r = i * G; r < (i + 1) * G; r++) t.rows[r].kept += t.rows[r].in_tile;
    }
    for (int w = 0; w < 2; w++) {
      token.num_kept += __builtin_popcountll(token.kept[w]);
      token.v_tiles += token.kept[w] != 0;
      fetch_values(t, w, token.kept[w]);
    }
  }

  template <bool LANES>
  float exponentials(float* s, int begin, int end, float max, float* lanes) const {
    return (avx512 ? prompt_exponentials_avx512<LANES> : prompt_exponentials<LANES>)(s, begin, end, max, lanes);
  }

  void raise_max(Task& t, int r, float value) const {
    Row& row = t.rows[r];
    if (!(value > row.max)) return;
    const float factor = std::exp2(row.max - value);
    row.max = value;
    row.sum *= factor;
    row.sink *= factor;
    row.kept *= factor;
    scale_row(acc_of(t, r), D, factor);
  }

  // Groups that a token sees in part have no mean: it keeps them whole.
  void keep_parts(Token& token, const Span& visible) const {
    for (int begin = visible.begin >> group_shift << group_shift; begin < visible.end; begin += a.group_size)
      if (begin < visible.begin || begin + a.group_size > visible.end)
        set_bits(token.kept, begin, begin + a.group_size);
  }

  // Mass of every compensation group of the key tile, one row.
  void sum_groups(float* lanes, int begin, int end, float* groups) const {
    std::fill(lanes, lanes + begin / 2, 0.0f);
    std::fill(lanes + end / 2, lanes + kUnits * 8, 0.0f);
    alignas(32) float sums[kUnits];
    _mm256_store_ps(sums, transposed_sums(lanes));
    const int width = 1 << (group_shift - 4);
    for (int i = 0; i < num_groups; i++) {
      const float* first = sums + i * width;
      groups[i] = std::accumulate(first + 1, first + width, *first);
    }
  }

  // A row keeps this mass of a group.
  void keep_mass(Row& row, float& lost, float mass) const {
    row.kept += mass;
    lost = std::max(lost - mass, 0.0f);
  }

  // Multiplies V tile w by the exponentials of tokens [begin, end), which become zero where not kept.
  void add_whole(Task& t, int begin, int end, int w) const {
    uint64_t seen = 0;
    for (int i = begin; i < end; i++) {
      const Token& token = t.tokens[i];
      seen |= token.seen[w];
      for (int r = i * G; r < (i + 1) * G; r++) {
        float* p = weights_of(t, r);
        if (token.kept[w] == ~uint64_t{0} && !token.lacks) continue;
        mask_kept(p + kVTile * w, token.kept[w], t.lanes);
        if (!token.lacks) continue;
        alignas(32) float masses[kUnits];
        sum_groups(t.lanes, 0, kVTile, masses);
        float* lost = p + kKeyTile + w * num_groups / 2;
        for (int k = 0; k < num_groups / 2; k++) keep_mass(t.rows[r], lost[k], masses[k]);
      }
    }
    load_values(t, w, seen);
    const int first = kVTile * w + __builtin_ctzll(seen), last = kVTile * (w + 1) - __builtin_clzll(seen);
    const float* v = t.values + static_cast<size_t>(first) * v_stride;
    in_blocks(begin * G, end * G, [&](int row, auto n) {
      constexpr int kRows = decltype(n)::value;
      const float* p = weights_of(t, row) + first;
      (avx512 ? value_block_avx512<kRows> : value_block<kRows>)(v, v_stride, last - first, p, kWeights,
                                                                acc_of(t, row), D);
    });
  }

  // Adds the V rows that a token keeps of V tiles that were not multiplied whole, and the means for what it does not.
  void add_listed(Task& t, int i, const bool (&whole)[2]) const {
    const Token& token = t.tokens[i];
    int found = 0;
    for (int w = 0; w < 2; w++) {
      if (whole[w] || token.kept[w] == 0) continue;
      load_values(t, w, token.kept[w]);
      for (int k = w * num_groups / 2; k < (w + 1) * num_groups / 2; k++) {
        const int from = found, key = k << group_shift;
        for (uint64_t bits = token.kept[w] & bits_between(key - kVTile * w, key + a.group_size - kVTile * w); bits;
             bits &= bits - 1)
          t.listed[found++] = kVTile * w + __builtin_ctzll(bits);
        if (!token.lacks || found == from) continue;
        for (int r = i * G; r < (i + 1) * G; r++) {
          float *p = weights_of(t, r), mass = 0.0f;
          for (int j = from; j < found; j++) mass += p[t.listed[j]];
          keep_mass(t.rows[r], p[kKeyTile + k], mass);
        }
      }
    }
    if (token.lacks)
      for (int k = 0; k < num_groups; k++) t.listed[found++] = kKeyTile + k;
    if (found == 0) return;
    in_blocks(i * G, (i + 1) * G, [&](int row, auto n) {
      constexpr int kRows = decltype(n)::value;
      (avx512 ? listed_block_avx512<kRows> : listed_block<kRows>)(t.values, v_stride, t.listed, found,
                                                                  weights_of(t, row), kWeights, acc_of(t, row), D);
    });
  }

  void finish(const Task& t, int i) const {
    const int64_t token = t.token + i;
    for (int g = 0; g < G; g++) {
      const Row& row = t.rows[i * G + g];
      const float* acc = acc_of(t, i * G + g);
      const int head = t.kv_head * G + g;
      const __m256 scale = _mm256_set1_ps(1.0f / (row.sum + row.sink));
      T* out = static_cast<T*>(a.out) + token * a.out_stride + static_cast<size_t>(head) * D;
      for (int d = 0; d < D; d += 16) {
        __m256 x = _mm256_load_ps(acc + d), y = _mm256_load_ps(acc + d + 8);
        if (!natural) Elem<T>::unpermute(x, y);
        Elem<T>::store16(out + d, _mm256_mul_ps(scale, x), _mm256_mul_ps(scale, y));
      }
      a.kept_mass[token * a.num_heads + head] = row.kept / row.sum;
    }
    a.num_kept[token * a.num_kv_heads + t.kv_head] = t.tokens[i].num_kept;
    a.v_tiles_read[token * a.num_kv_heads + t.kv_head] = t.tokens[i].v_tiles;
  }
};

}  // namespace topt
