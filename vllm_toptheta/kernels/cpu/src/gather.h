// The second half of a row: the kept V rows as one list with known weights, then the stored means for what was lost.
#pragma once

#include "select.h"

namespace topt {

constexpr float kOne = 1.0f;

template <class T>
class Gather {
 public:
  static size_t bytes(const Geometry<T>& g) {
    const size_t rows = chunk_rows(g);
    return 2 * (Arena::bytes_for<const T*>(rows) + Arena::bytes_for<const char*>(max_lines(g)) +
                Arena::bytes_for<float>(g.G * rows));
  }

  // acc: [G][D], written in the order of Elem<T>::load16, or of Wide<T>::load32.
  Gather(const Row<T>& row, Arena& arena, float* acc)
      : row(row), g(row.geometry), acc(acc), limit(chunk_rows(g)), line_limit(max_lines(g)) {
    for (Chunk& c : chunks) {
      c.rows = arena.take<const T*>(limit);
      c.lines = arena.take<const char*>(line_limit);
      c.list_weights = arena.take<float>(static_cast<size_t>(g.G) * limit);
    }
    std::fill_n(acc, static_cast<size_t>(g.G) * g.D, 0.0f);
  }

  // Groups [begin, end) of the row.
  void run(int begin, int end) {
    begin = std::max(begin, row.groups.begin);
    end = std::min(end, row.groups.end);
    for (int i = begin; i < end; i++) {
      if (!row.mask[i]) continue;
      if (row.reads_whole(i))
        add_run(i);
      else
        add_rows(i);
    }
    if (row.reads_means) add_means(std::max(begin, row.whole.begin), std::min(end, row.whole.end));
    flip();
    flip();
  }

 private:
  // V rows that are prefetched while those before them are added: a list, or a run.
  struct Chunk {
    const T** rows;
    const char** lines;      // of the rows, in address order
    float* list_weights;     // [G][limit]
    const T* run = nullptr;  // a list where it is null
    const char* ahead;       // of a run: what to prefetch beside it
    bool tiled = false;      // a list of V rows that lie in tiles
    RowWeights weights;
    int n = 0, num_lines = 0;
  };

  const Row<T>& row;
  const Geometry<T>& g;
  float* acc;
  const int limit, line_limit;
  Chunk chunks[2];
  int filling = 0;

  // Rows of a chunk: what stays in L1 beside the next one.
  static int chunk_rows(const Geometry<T>& g) {
    return std::max<int>(kChunkBytes / (g.D * static_cast<int>(sizeof(T))) & ~7, 8);
  }
  // Of a chunk; a row in tiles fills half of each.
  static int max_lines(const Geometry<T>& g) { return chunk_rows(g) * g.row_lines() * (kTiled<T> ? 2 : 1) + 16; }

  static const char* bytes(const T* p) { return reinterpret_cast<const char*>(p); }

  // Adds the chunk before the one that was being filled, and starts the next one.
  void flip() {
    Chunk &next = chunks[filling], &now = chunks[filling ^ 1];
    if (now.n)
      add(now, next);
    else
      start(next);
    now.n = now.num_lines = 0;
    now.run = nullptr;
    filling ^= 1;
  }

  // Prefetches a chunk that follows no other.
  void start(const Chunk& c) const {
    for (int i = 0; i < c.num_lines; i++) prefetch(c.lines[i]);
    if (c.run)
      for (int d = 0; d < c.n * g.D; d += kLine<T>) prefetch(bytes(c.run + d));
  }

  void add(Chunk& now, Chunk& next) {
    const bool run = now.run && next.run;
    if (!run) {
      list(now);
      list(next);
      for (int i = next.num_lines; i < line_limit; i++) next.lines[i] = bytes(now.rows[0]);
    }
    g.for_tiles([&](int g0, auto heads) {
      constexpr int GT = decltype(heads)::value;
      RowWeights w = now.weights;
      w.p += static_cast<size_t>(g0) * w.p_stride;
      w.factor += static_cast<size_t>(g0) * w.factor_stride;
      float* sums = acc + static_cast<size_t>(g0) * g.D;
      const auto with = [&](auto rows, auto ahead) {
        if (g0 == 0)
          add_tile<GT>(rows, now.n, w, sums, ahead);
        else
          add_tile<GT>(rows, now.n, w, sums, NoLines{});
      };
      if (run) return with(RowRun<T>(now.run, g.D), LineRun{now.ahead ? now.ahead : bytes(next.run)});
      if constexpr (kTiled<T>)
        if (now.tiled) return with(TiledRowList{now.rows, row.v_line_stride()}, LineList{next.lines});
      with(RowList<T>(now.rows), LineList{next.lines});
    });
  }

  template <int GT, class Rows, class Lines>
  void add_tile(Rows rows, int n, const RowWeights& w, float* sums, Lines ahead) const {
    if constexpr (GT <= kMaxTileHeads)
      if (!g.wide) return value_chunk<T, GT>(rows, g.D, n, w, sums, ahead);
    value_chunk_avx512<T, GT>(rows, g.D, n, w, sums, ahead);
  }

  // A row of so many lines, so many elements apart.
  void push(Chunk& c, const T* v, int num_lines, int stride) const {
    c.rows[c.n++] = v;
    const int64_t step = stride * static_cast<int64_t>(sizeof(T));
    const __m256i four = _mm256_setr_epi64x(0, step, 2 * step, 3 * step);
    for (int line = 0; line < num_lines; line += 4) {
      const int64_t at = reinterpret_cast<int64_t>(bytes(v)) + line * step;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c.lines + c.num_lines + line),
                          _mm256_add_epi64(_mm256_set1_epi64x(at), four));
    }
    c.num_lines += num_lines;
  }

  // A run beside a list is read as one.
  void list(Chunk& c) const {
    if (!c.run) return;
    const int n = c.n;
    for (c.n = 0; c.n < n;) push(c, c.run + static_cast<size_t>(c.n) * g.D, g.row_lines(), kLine<T>);
    c.run = nullptr;
  }

  void add_rows(int i) {
    const auto [block, in_block] = g.locate(i);
    const int first = in_block * g.group_size, num_lines = row.v_lines(), stride = row.v_line_stride();
    const float *p = row.p_of_group(i), *scale = row.scale + i;
    int slots[64], n = 0;
    for (uint64_t bits = row.mask[i]; bits; bits &= bits - 1) slots[n++] = __builtin_ctzll(bits);
    for (int done = 0; done < n;) {
      Chunk& c = chunks[filling];
      const int* some = slots + done;
      const int count = std::min(limit - c.n, n - done);
      for (int h = 0; h < g.G; h++) {
        const float *from = p + static_cast<size_t>(h) * g.B, factor = scale[static_cast<size_t>(h) * row.stride];
        float* to = c.list_weights + h * limit + c.n;
        for (int j = 0; j < count; j++) to[j] = from[some[j]] * factor;
      }
      c.weights = {c.list_weights, &kOne, limit, 0};
      c.tiled = kTiled<T>;
      for (int j = 0; j < count; j++) push(c, row.v_row(block, first + some[j]), num_lines, stride);
      if (c.n == limit) flip();
      done += count;
    }
  }

  // All V rows of a group. What the others have lost is spread over them, which is the same as adding their mean.
  void add_run(int i) {
    const auto [block, in_block] = g.locate(i);
    const int size = g.group_size;
    const bool full = !row.reads_means && row.mask[i] == ~uint64_t{0} >> (64 - size);
    float* p = row.p_of_group(i);
    if (full) {  // its exponentials are weights as they are, but they have left the nearer caches
      for (int h = 0; h < g.G; h++)
        for (int t = 0; t < size; t += 16) prefetch(reinterpret_cast<const char*>(p + static_cast<size_t>(h) * g.B + t));
    } else {
      size == 64 ? weigh<64>(i, p) : size == 32 ? weigh<32>(i, p) : weigh<16>(i, p);
    }
    if (chunks[filling].n) flip();
    for (int r = 0; r < size; r += limit) {
      Chunk& c = chunks[filling];
      c.run = row.v_row(block, in_block * size + r);
      c.weights = {p + r, full ? row.scale + i : &kOne, g.B, full ? row.stride : 0};
      c.n = std::min(limit, size - r);
      const size_t at = static_cast<size_t>(in_block * size + r) * g.D * sizeof(T);
      c.ahead = row.dense ? row.ahead(block, at, row.num_blocks - 1, true) : nullptr;
      flip();
    }
  }

  // Exponentials of a group to weights.
  template <int SIZE>
  void weigh(int i, float* p) const {
    constexpr int N = SIZE / 8;
    __m256 lanes[N];
    TOPT_UNROLL for (int t = 0; t < N; t++) lanes[t] = lanes_of(row.mask[i] >> 8 * t);
    for (int h = 0; h < g.G; h++, p += g.B) {
      const size_t at = static_cast<size_t>(h) * row.stride + i;
      const __m256 scale = _mm256_set1_ps(row.scale[at]);
      const __m256 add = _mm256_set1_ps(row.reads_means ? row.limit[at] / SIZE : 0);
      TOPT_UNROLL for (int t = 0; t < N; t++)
          _mm256_store_ps(p + 8 * t, _mm256_fmadd_ps(scale, _mm256_and_ps(lanes[t], _mm256_load_ps(p + 8 * t)), add));
    }
  }

  void add_means(int begin, int end) {
    if (kTiled<T> && chunks[filling].n) flip();  // means do not lie in tiles
    for (int i = begin; i < end; i++) {
      if (row.mask[i] && row.reads_whole(i)) continue;
      Chunk& c = chunks[filling];
      for (int h = 0; h < g.G; h++)
        c.list_weights[h * limit + c.n] = row.limit[static_cast<size_t>(h) * row.stride + i];
      c.weights = {c.list_weights, &kOne, limit, 0};
      c.tiled = false;
      push(c, row.mean(i), g.row_lines(), kLine<T>);
      if (c.n == limit) flip();
    }
  }
};

}  // namespace topt
