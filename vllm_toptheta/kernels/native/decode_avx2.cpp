// Decode attention with Top-theta pruning over the paged cache: how work is cut, and what happens to one page.
//
// A task is a run of pages of one (row, kv head). It leaves a partial result (running maximum, sum of exponentials,
// weighted V sum, counts) per query head; whoever finishes the last task of a (row, kv head) merges them.
#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "tiles_avx2.h"

namespace topt {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMinSplitTokens = 256;  // shorter tasks cost more to start than they take
constexpr int kMaxUnits = 32;         // runs of 16 tokens in the largest block
constexpr int kDenseEighths = 3;        // a block that keeps more than 3/8 of its V rows is read as a whole
constexpr int kTasksPerThread = 8;    // fine enough that a disturbed core does not hold up the others
constexpr int64_t kMinParallelWork = 32 * 1024;  // key elements below which waking threads does not pay

// Grow-only scratch memory of one thread.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  // Makes room for `bytes`; false when out of memory.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(data_);
    size_ = (bytes + 4095) & ~size_t{4095};
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (!data_) size_ = 0;
    return data_ != nullptr;
  }
  template <class U>
  U* take(size_t n) {
    U* p = reinterpret_cast<U*>(data_ + used_);
    used_ += bytes_for<U>(n);
    return p;
  }
  template <class U>
  static size_t bytes_for(size_t n) {
    return (n * sizeof(U) + 63) & ~size_t{63};
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

thread_local Arena caller_arena, worker_arena;

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

template <class T>
class Decoder {
 public:
  explicit Decoder(const ToptDecodeArgs& args)
      : a(args),
        D(args.head_dim),
        B(args.block_size),
        G(args.num_heads / args.num_kv_heads),
        num_tiles((G + kMaxTileHeads - 1) / kMaxTileHeads),
        tile_heads(G / num_tiles),
        wider_tiles(G % num_tiles),
        num_units(B / 16),
        num_words((B + 63) / 64),
        lost_stride((num_units + 7) & ~7),
        group_shift(__builtin_ctz(args.group_size)) {}

  int32_t run() {
    int num_threads = a.num_threads > 0 ? a.num_threads : omp_get_max_threads();
    if (!plan(num_threads)) return kOutOfMemory;
    int32_t status = kOk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)
    for (int i = 0; i < num_tasks; i++) {
      const int32_t result = run_task(i);
      if (result != kOk) __atomic_store_n(&status, result, __ATOMIC_RELAXED);
    }
    return status;
  }

 private:
  const ToptDecodeArgs& a;
  const int D, B, G;
  const int num_tiles;                // runs of at most kMaxTileHeads heads that are computed together
  const int tile_heads, wider_tiles;  // heads in a tile; the first tiles have one more
  const int num_units;    // runs of 16 tokens in a block
  const int num_words;    // 64-bit words of kept bits in a block
  const int lost_stride;  // num_units, padded to whole vectors
  const int group_shift;  // log2 of the compensation group
  int num_tasks = 0;
  int32_t* first_task = nullptr;  // [num_seqs + 1]
  int32_t* unfinished = nullptr;  // [num_seqs][num_kv_heads] tasks that have not reported
  HeadState* states = nullptr;    // [num_tasks][G]
  float* accs = nullptr;          // [num_tasks][G][D]
  int32_t* unions = nullptr;      // [num_tasks] V rows kept by any head

  Span span(int seq) const {
    const int n = std::max(a.seq_lens[seq], 0);
    return {a.window > 0 ? std::max(n - a.window, 0) : 0, n};
  }
  int first_block(const Span& s) const { return s.begin / B; }
  int num_blocks(const Span& s) const { return s.end > s.begin ? (s.end + B - 1) / B - s.begin / B : 0; }
  int num_splits(int seq) const { return (first_task[seq + 1] - first_task[seq]) / a.num_kv_heads; }

  // Cuts the rows into tasks of about equal size and lays out the partial results.
  bool plan(int& num_threads) {
    int64_t work = 0;
    for (int s = 0; s < a.num_seqs; s++) work += int64_t{num_blocks(span(s))} * a.num_kv_heads;
    if (a.num_threads <= 0 && work * B * D < kMinParallelWork) num_threads = 1;
    const int64_t target = num_threads == 1 ? work : work / (int64_t{num_threads} * kTasksPerThread) + 1;
    const int64_t per_task = std::max<int64_t>({target, kMinSplitTokens / B, 1});
    const auto splits = [&](int seq) -> int64_t {
      const int blocks = num_blocks(span(seq));
      const int64_t wanted = a.num_splits > 0 ? a.num_splits : (blocks + per_task - 1) / per_task;
      return std::max<int64_t>(std::min<int64_t>(wanted, blocks), 1);
    };
    int64_t tasks = 0;
    for (int s = 0; s < a.num_seqs; s++) tasks += splits(s) * a.num_kv_heads;
    const size_t rows = static_cast<size_t>(a.num_seqs) * a.num_kv_heads, heads = tasks * G;
    if (!caller_arena.reserve(Arena::bytes_for<int32_t>(a.num_seqs + 1) + Arena::bytes_for<int32_t>(rows) +
                              Arena::bytes_for<HeadState>(heads) + Arena::bytes_for<float>(heads * D) +
                              Arena::bytes_for<int32_t>(tasks)))
      return false;
    first_task = caller_arena.take<int32_t>(a.num_seqs + 1);
    unfinished = caller_arena.take<int32_t>(rows);
    states = caller_arena.take<HeadState>(heads);
    accs = caller_arena.take<float>(heads * D);
    unions = caller_arena.take<int32_t>(tasks);
    for (int s = 0; s < a.num_seqs; s++) {
      const int n = static_cast<int>(splits(s));
      first_task[s] = num_tasks;
      num_tasks += n * a.num_kv_heads;
      std::fill_n(unfinished + s * a.num_kv_heads, a.num_kv_heads, n);
    }
    first_task[a.num_seqs] = num_tasks;
    return true;
  }

  // ---------------------------------------------------------------- one task

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
    float* q;               // tiles of [D][tile heads]
    float *theta, *lost;    // [G]; [G][lost_stride], one value a compensation group
    float* lost_lanes;      // [num_units rounded up to 8][8]
    float* weights;         // [G][B]
    int32_t* offsets;       // [B]
    float* gathered;        // [B]
    int32_t* new_best;      // [G]
    Block blocks[2];
    HeadState* state;
    float* acc;
    int32_t num_union;
  };

  int tile_begin(int tile) const { return tile * tile_heads + std::min(tile, wider_tiles); }
  const T* page(int64_t block, int kv_head) const {
    return static_cast<const T*>(a.kv_cache) + block * a.block_stride + kv_head * a.head_stride;
  }
  const T* v_of(const T* page) const { return page + static_cast<size_t>(B) * D; }
  const T* means_of(const T* page) const { return page + static_cast<size_t>(2) * B * D; }

  bool take_scratch(Task& t) const {
    const size_t GB = static_cast<size_t>(G) * B, lanes = static_cast<size_t>((num_units + 7) / 8 * 8) * 8;
    Arena& arena = worker_arena;
    const size_t bytes = Arena::bytes_for<float>(static_cast<size_t>(G) * D) + Arena::bytes_for<float>(G) +
                         Arena::bytes_for<float>(GB) * 3 +
                         Arena::bytes_for<float>(static_cast<size_t>(G) * lost_stride) + Arena::bytes_for<float>(lanes) +
                         Arena::bytes_for<float>(B) * 2 + Arena::bytes_for<int32_t>(G) +
                         Arena::bytes_for<uint64_t>(static_cast<size_t>(G) * num_words) * 2;
    if (!arena.reserve(bytes)) return false;
    t.q = arena.take<float>(static_cast<size_t>(G) * D);
    t.theta = arena.take<float>(G);
    t.lost = arena.take<float>(static_cast<size_t>(G) * lost_stride);
    std::fill_n(t.lost, static_cast<size_t>(G) * lost_stride, 0.0f);
    t.weights = arena.take<float>(GB);
    t.lost_lanes = arena.take<float>(lanes);
    t.offsets = arena.take<int32_t>(B);
    t.gathered = arena.take<float>(B);
    t.new_best = arena.take<int32_t>(G);
    for (Block& b : t.blocks) {
      b.p = arena.take<float>(GB);
      b.kept = arena.take<uint64_t>(static_cast<size_t>(G) * num_words);
      std::fill_n(b.kept, static_cast<size_t>(G) * num_words, uint64_t{0});
      b.pending = false;
    }
    return true;
  }

  int32_t run_task(int index) const {
    int seq = 0;
    for (int high = a.num_seqs; high - seq > 1;) {  // the last sequence whose first task is not after this one
      const int middle = (seq + high) / 2;
      (first_task[middle] <= index ? seq : high) = middle;
    }
    const int splits = num_splits(seq), local = index - first_task[seq];
    const int kv_head = local / splits, split = local % splits;
    Task t;
    if (!take_scratch(t)) return kOutOfMemory;
    t.seq = seq;
    t.kv_head = kv_head;
    t.span = span(seq);
    t.dense = a.dense[seq] != 0;
    t.state = states + static_cast<size_t>(index) * G;
    t.acc = accs + static_cast<size_t>(index) * G * D;
    t.num_union = 0;
    const int64_t blocks = num_blocks(t.span), start = first_block(t.span);
    const int32_t status =
        attend(t, static_cast<int>(start + blocks * split / splits), static_cast<int>(start + blocks * (split + 1) / splits));
    unions[index] = t.num_union;
    if (__atomic_sub_fetch(unfinished + seq * a.num_kv_heads + kv_head, 1, __ATOMIC_ACQ_REL) == 0 && status == kOk)
      merge(t, index - split, splits);
    return status;
  }

  int32_t attend(Task& t, int begin, int end) const {
    std::fill_n(t.acc, static_cast<size_t>(G) * D, 0.0f);
    for (int g = 0; g < G; g++) t.state[g] = {-INFINITY, 0.0f, 0, -1, 0};
    prepare_query(t);
    const int32_t* table = a.block_table + t.seq * a.block_table_stride;
    for (int b = begin; b < end; b++)
      if (table[b] < 0 || table[b] >= a.num_blocks) return kBlockOutOfRange;
    bool reads_v = t.dense;  // whether this block is expected to read all of V
    for (int b = begin; b < end; b++) {
      const T* here = page(table[b], t.kv_head);
      const T* next = page(table[b + 1 < end ? b + 1 : b], t.kv_head);
      Block& now = t.blocks[b & 1];
      now.v = v_of(here);
      const Span visible = {std::max(t.span.begin - b * B, 0), std::min(t.span.end - b * B, B)};
      Block& before = t.blocks[(b + 1) & 1];
      scores(t, here, now, visible, reinterpret_cast<const char*>(reads_v ? now.v : next));
      flush(t, before);
      if (t.dense)
        dense_block(t, now, visible, next);
      else
        reads_v = pruned_block(t, now, visible, b * B, here, next);
    }
    flush(t, t.blocks[0]);
    flush(t, t.blocks[1]);
    return kOk;
  }

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

  // Calls f with the tile's number of heads as a compile-time constant.
  template <class F>
  static TOPT_INLINE const char* with_heads(int heads, F&& f) {
    switch (heads) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      default: return f(std::integral_constant<int, 4>{});
    }
  }

  // Scores of all heads with the visible keys of a page. K is cut into chunks that stay in L1 while all heads use
  // them; the first tile of heads prefetches the chunk that follows.
  void scores(Task& t, const T* k, Block& block, const Span& visible, const char* after) const {
    const int begin = visible.begin & ~15, end = (visible.end + 15) & ~15;
    const int chunks = std::max<int>((static_cast<size_t>(D) * B * sizeof(T) + kChunkBytes - 1) / kChunkBytes, 1);
    const int step = ((D + chunks - 1) / chunks + 1) & ~1;
    for (int d = 0; d < D; d += step) {
      const int dims = std::min(step, D - d);
      const bool first = d == 0, last = d + dims == D;
      const T* chunk = k + static_cast<size_t>(d) * B;
      const char* ahead = last ? after : reinterpret_cast<const char*>(chunk + static_cast<size_t>(dims) * B);
      for (int tile = 0; tile < num_tiles; tile++) {
        const int g0 = tile_begin(tile), heads = tile_begin(tile + 1) - g0;
        const float* q = t.q + static_cast<size_t>(g0) * D + static_cast<size_t>(d) * heads;
        float* s = block.p + static_cast<size_t>(g0) * B;
        with_heads(heads, [&](auto n) {
          constexpr int GT = decltype(n)::value;
          return tile == 0 ? score_chunk<T, GT, true>(chunk, B, q, dims, first, last, s, B, begin, end, ahead)
                           : score_chunk<T, GT, false>(chunk, B, q, dims, first, last, s, B, begin, end, ahead);
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
      const char* ahead = r + n == rows.end ? after : reinterpret_cast<const char*>(chunk + static_cast<size_t>(n) * D);
      for (int tile = 0; tile < num_tiles; tile++) {
        const int g0 = tile_begin(tile), heads = tile_begin(tile + 1) - g0;
        const float* w = p + static_cast<size_t>(g0) * p_stride + r;
        float* acc = t.acc + static_cast<size_t>(g0) * D;
        with_heads(heads, [&](auto m) {
          constexpr int GT = decltype(m)::value;
          return tile == 0 ? value_chunk<T, GT, true>(chunk, D, n, w, p_stride, acc, ahead)
                           : value_chunk<T, GT, false>(chunk, D, n, w, p_stride, acc, ahead);
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
      t.state[g].sum += exponentials<false, false>(s, begin, end, t.state[g].max, 0, nullptr, nullptr,
                                                   reinterpret_cast<const char*>(block.v) + kChunkBytes);
      t.state[g].num_kept += visible.end - visible.begin;
    }
    t.num_union += visible.end - visible.begin;
    weighted_rows(t, block.v, visible, block.p, B, reinterpret_cast<const char*>(next));
  }

  // Softmax and selection of one block. Returns whether it read all of V.
  bool pruned_block(Task& t, Block& block, const Span& visible, int position, const T* here, const T* next) const {
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
      const char* ahead = reinterpret_cast<const char*>(means_of(next)) + g * num_units * 64;
      state.sum += a.compensation
                       ? exponentials<true, true>(s, begin, end, state.max, t.theta[g], kept, t.lost_lanes, ahead)
                       : exponentials<true, false>(s, begin, end, state.max, t.theta[g], kept, nullptr, ahead);
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
    if (rows * 8 > num_visible * kDenseEighths) {
      if (total < num_visible * G) keep_in_place(t, block, visible, begin, end);
      weighted_rows(t, block.v, visible, block.p, B, reinterpret_cast<const char*>(next));
      return true;
    }
    if (rows) fetch_union(block);
    block.pending = rows > 0;
    if (a.compensation) compensate(t, visible, block.v, means_of(here));
    return false;
  }

  // Clears the kept bits outside the visible tokens, which include what an earlier block left there.
  void hide(uint64_t* kept, const Span& visible) const {
    for (int w = 0; w < num_words; w++) {
      const int begin = std::clamp(visible.begin - 64 * w, 0, 64), end = std::clamp(visible.end - 64 * w, 0, 64);
      const uint64_t below_end = end == 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
      kept[w] &= begin == 64 ? 0 : below_end & ~uint64_t{0} << begin;
    }
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
      t.state[g].best_is_kept = 0;
      for (int h = 0; h < G; h++) t.state[g].best_is_kept |= static_cast<int32_t>(block.kept[h * num_words + slot / 64] >> (slot % 64) & 1);
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
        for (int d = 0; d < D; d += 64 / static_cast<int>(sizeof(T))) prefetch(reinterpret_cast<const char*>(row + d));
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
      if (n) gather_rows(block.v, D, t.offsets, t.gathered, n, t.acc + static_cast<size_t>(g) * D);
    }
  }

  // Turns exponentials into weights on all visible keys: zero where not kept, plus the group's lost mass in equal
  // parts, which is the same as compensating with the mean.
  void keep_in_place(Task& t, Block& block, const Span& visible, int begin, int end) const {
    alignas(32) float share[kMaxUnits];  // of a token in the lost mass of its group
    for (int i = begin; i < end; i += 16) {
      const Span group = group_of(i >> group_shift, visible);
      share[i / 16] = a.compensation ? 1.0f / (group.end - group.begin) : 0.0f;
    }
    for (int g = 0; g < G; g++)
      mask_and_spread(block.p + static_cast<size_t>(g) * B, begin, end, block.kept + g * num_words,
                      t.lost + static_cast<size_t>(g) * lost_stride, group_shift, share);
  }

  Span group_of(int group, const Span& visible) const {
    return {std::max(group << group_shift, visible.begin), std::min((group + 1) << group_shift, visible.end)};
  }

  // Adds lost mass times mean V: from the stored means where the row sees the whole group, else from the V rows.
  void compensate(Task& t, const Span& visible, const T* v, const T* means) const {
    const int size = a.group_size;
    const Span whole = {(visible.begin + size - 1) >> group_shift, visible.end >> group_shift};
    if (whole.begin < whole.end) weighted_rows(t, means, whole, t.lost, lost_stride, reinterpret_cast<const char*>(means));
    if (whole.end - whole.begin == B >> group_shift) return;
    for (int i = visible.begin >> group_shift; i * size < visible.end; i++) {
      if (i >= whole.begin && i < whole.end) continue;
      const Span part = group_of(i, visible);
      const float share = 1.0f / (part.end - part.begin);
      for (int g = 0; g < G; g++)
        std::fill(t.weights + g * B + part.begin, t.weights + g * B + part.end, t.lost[g * lost_stride + i] * share);
      weighted_rows(t, v, part, t.weights, B, reinterpret_cast<const char*>(v));
    }
  }

  // ---------------------------------------------------------------- merge

  void merge(Task& t, int first, int splits) const {
    const int64_t row = t.seq * static_cast<int64_t>(a.num_heads) + t.kv_head * G;
    int32_t v_rows = 0;
    for (int i = 0; i < splits; i++) v_rows += unions[first + i];
    float* total = t.q;  // the query is no longer needed: [D], natural order
    for (int g = 0; g < G; g++) {
      const HeadState* best = nullptr;
      float max = -INFINITY, sum = 0;
      int32_t num_kept = 0;
      for (int i = 0; i < splits; i++) {
        const HeadState& s = states[static_cast<size_t>(first + i) * G + g];
        num_kept += s.num_kept;
        if (!best || s.max > best->max) best = &s;
      }
      max = best->max;
      if (a.sinks) max = std::max(max, a.sinks[t.kv_head * G + g] * kLog2E);
      std::fill_n(total, D, 0.0f);
      for (int i = 0; i < splits; i++) {
        const HeadState& s = states[static_cast<size_t>(first + i) * G + g];
        if (s.max == -INFINITY && s.sum == 0) continue;
        const float factor = std::exp2(s.max - max);
        sum += s.sum * factor;
        const float* acc = accs + (static_cast<size_t>(first + i) * G + g) * D;
        const __m256 f = _mm256_set1_ps(factor);
        for (int d = 0; d < D; d += 8)
          _mm256_store_ps(total + d, _mm256_fmadd_ps(f, _mm256_load_ps(acc + d), _mm256_load_ps(total + d)));
      }
      for (int d = 0; d < D; d += 16) {
        __m256 x = _mm256_load_ps(total + d), y = _mm256_load_ps(total + d + 8);
        Elem<T>::unpermute(x, y);
        _mm256_store_ps(total + d, x);
        _mm256_store_ps(total + d + 8, y);
      }
      if (num_kept == 0 && best->best_pos >= 0) {
        num_kept = 1;
        v_rows += !best->best_is_kept && !is_best_of_earlier_head(first, splits, g, best->best_pos);
        keep_best(t, best->best_pos, std::exp2(best->max - max), total);
      }
      if (a.sinks) sum += std::exp2(a.sinks[t.kv_head * G + g] * kLog2E - max);
      const __m256 scale = _mm256_set1_ps(t.span.end > t.span.begin ? 1.0f / sum : 0.0f);
      T* out = static_cast<T*>(a.out) + t.seq * a.out_stride + static_cast<size_t>(t.kv_head * G + g) * D;
      for (int d = 0; d < D; d += 16)
        Elem<T>::store16(out + d, _mm256_mul_ps(scale, _mm256_load_ps(total + d)),
                         _mm256_mul_ps(scale, _mm256_load_ps(total + d + 8)));
      a.num_kept[row + g] = num_kept;
    }
    a.v_rows_read[t.seq * static_cast<int64_t>(a.num_kv_heads) + t.kv_head] = v_rows;
  }

  // Whether a head before g, itself without a key that reaches theta, already reads the V row at this position.
  bool is_best_of_earlier_head(int first, int splits, int g, int position) const {
    for (int h = 0; h < g; h++) {
      int32_t num_kept = 0;
      const HeadState* best = nullptr;
      for (int i = 0; i < splits; i++) {
        const HeadState& s = states[static_cast<size_t>(first + i) * G + h];
        num_kept += s.num_kept;
        if (!best || s.max > best->max) best = &s;
      }
      if (num_kept == 0 && best->best_pos == position) return true;
    }
    return false;
  }

  // Gives a head that kept nothing its best key back, and takes it out of the lost mass of its group.
  void keep_best(const Task& t, int position, float p, float* total) const {
    const int32_t* table = a.block_table + t.seq * a.block_table_stride;
    const int block = position / B, slot = position % B;
    const T* here = page(table[block], t.kv_head);
    const T* v = v_of(here);
    add_scaled(total, v + static_cast<size_t>(slot) * D, D, p);
    if (!a.compensation) return;
    const Span visible = {std::max(t.span.begin - block * B, 0), std::min(t.span.end - block * B, B)};
    const int index = slot / a.group_size;
    const Span group = group_of(index, visible);
    if (group.end - group.begin == a.group_size) {
      add_scaled(total, means_of(here) + static_cast<size_t>(index) * D, D, -p);
      return;
    }
    for (int i = group.begin; i < group.end; i++)
      add_scaled(total, v + static_cast<size_t>(i) * D, D, -p / (group.end - group.begin));
  }
};

template <class T>
int32_t update_v_means(const ToptMeansArgs& a) {
  const int D = a.head_dim, B = a.block_size, size = a.group_size;
  for (int64_t i = 0; i < a.num_tokens; i++)
    if (a.slot_mapping[i] >= a.num_blocks * B) return kBlockOutOfRange;
#pragma omp parallel for schedule(static) if (a.num_tokens * a.num_kv_heads * D > 64 * 1024)
  for (int64_t i = 0; i < a.num_tokens; i++) {
    const int64_t slot = a.slot_mapping[i];
    if (slot < 0 || (slot + 1) % size != 0) continue;
    const int group = static_cast<int>(slot % B) / size;
    for (int h = 0; h < a.num_kv_heads; h++) {
      T* page = static_cast<T*>(a.kv_cache) + slot / B * a.block_stride + h * a.head_stride;
      const T* v = page + static_cast<size_t>(B + group * size) * D;
      T* mean = page + static_cast<size_t>(2 * B + group) * D;
      const __m256 share = _mm256_set1_ps(1.0f / size);
      for (int d = 0; d < D; d += 16) {
        __m256 a0 = _mm256_setzero_ps(), a1 = a0;
        for (int r = 0; r < size; r++) {
          __m256 x, y;
          Elem<T>::load16(v + static_cast<size_t>(r) * D + d, x, y);
          a0 = _mm256_add_ps(a0, x);
          a1 = _mm256_add_ps(a1, y);
        }
        Elem<T>::unpermute(a0, a1);
        Elem<T>::store16(mean + d, _mm256_mul_ps(a0, share), _mm256_mul_ps(a1, share));
      }
    }
  }
  return kOk;
}

}  // namespace
}  // namespace topt

int32_t topt_decode_avx2(const ToptDecodeArgs& args) {
  switch (args.dtype) {
    case kBFloat16: return topt::Decoder<topt::bf16>(args).run();
    case kFloat16: return topt::Decoder<topt::fp16>(args).run();
    case kFloat32: return topt::Decoder<float>(args).run();
  }
  return kUnsupportedDtype;
}

int32_t topt_update_v_means_avx2(const ToptMeansArgs& args) {
  switch (args.dtype) {
    case kBFloat16: return topt::update_v_means<topt::bf16>(args);
    case kFloat16: return topt::update_v_means<topt::fp16>(args);
    case kFloat32: return topt::update_v_means<float>(args);
  }
  return kUnsupportedDtype;
}
