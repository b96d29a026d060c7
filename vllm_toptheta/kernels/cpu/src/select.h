// The middle of a row: what it keeps, and with which weights. Compiled once, the same for every instruction set: kept
// keys are bit-identical where scores are.
#pragma once

#include "row.h"

namespace topt {

constexpr int kMaxLifts = 12;
constexpr int kLongGroup = 256;
constexpr int kFewKeys = 8;
constexpr int kLookAhead = 4;      // groups between the prefetch of their exponentials and their test
constexpr int kFetchLines = 2048;  // of V that the selection prefetches: a part of L2

// A group that keeps more than kWholePercent of its V rows is read as a whole. Changing between both ways of reading
// costs; so in a row that keeps more than kMany of all, one does with half of that. Narrow rows of V gain less from
// being skipped.
constexpr int kWholePercent = 50, kManyPercent = 33, kManyNarrowPercent = 25;
constexpr int kNarrowRow = 128;  // bytes

template <class T>
class Select {
 public:
  static size_t bytes(const Geometry<T>& g) {
    return 2 * Arena::bytes_for<Forced>(g.G + 2) + 4 * Arena::bytes_for<float>(g.G);
  }

  Select(Row<T>& row, Arena& arena)
      : row(row),
        g(row.geometry),
        a(g.a),
        forced(arena.take<Forced>(g.G + 2)),
        top(arena.take<float>(g.G)),
        mass(arena.take<float>(g.G)),
        total(arena.take<float>(g.G)),
        kept_mass(arena.take<float>(g.G)) {}

  void run() {
    for (int h = 0; h < g.G; h++) combine(h);
    if (row.dense)
      keep_all();
    else
      keep_probable();
  }

  // Counts what the gather reads, to cut that of a split row into equal parts.
  void count_rows() {
    row.rows_before[0] = 0;
    for (int i = 0; i < row.stride; i++) {
      const int rows = i < row.groups.begin || i >= row.groups.end ? 0
                       : row.reads_whole(i)                       ? g.group_size
                                                                   : __builtin_popcountll(row.mask[i]);
      row.rows_before[i + 1] = row.rows_before[i] + rows + 1;
    }
  }

 private:
  // Keys that are kept whatever the threshold.
  struct Forced {
    int group;
    uint64_t bits;
  };

  Row<T>& row;
  const Geometry<T>& g;
  const ToptDecodeArgs& a;
  Forced* forced;
  int num_forced = 0;
  float* top;        // [G] largest score
  float* mass;       // [G] sum of the exponentials of all keys, relative to it
  float* total;      // [G] the same with the sink
  float* kept_mass;  // [G] kept share of the mass

  size_t at(int h) const { return static_cast<size_t>(h) * row.stride; }

  // Mass of a head from its groups, in the order of their positions; scale becomes the exponential of each group's
  // largest score.
  void combine(int h) {
    const float* max = row.max + at(h);
    float m = -INFINITY;
    for (int i = row.groups.begin; i < row.groups.end; i++) m = std::max(m, max[i]);
    const __m256 highest = _mm256_set1_ps(m);
    __m256 lanes = _mm256_setzero_ps();
    for (int i = 0; i < row.stride; i += 8) {
      const __m256 e = exp2_nonpositive(_mm256_sub_ps(_mm256_load_ps(max + i), highest));
      _mm256_store_ps(row.scale + at(h) + i, e);
      lanes = _mm256_fmadd_ps(_mm256_load_ps(row.sum + at(h) + i), e, lanes);
    }
    top[h] = m;
    mass[h] = total[h] = horizontal_sum(lanes);
    // A sink far above all scores leaves them no probability, but it must stay a number.
    if (a.sinks) total[h] += std::exp2(std::min(a.sinks[row.kv_head * g.G + h] * kLog2E - m, 100.0f));
  }

  void keep_all() {
    int count = 0;
    for (int i = row.groups.begin; i < row.groups.end; i++) {
      row.mask[i] = row.visible_bits(i);
      count += __builtin_popcountll(row.mask[i]);
    }
    for (int h = 0; h < g.G; h++) {
      multiply_scale(h, 1.0f / total[h]);
      kept_mass[h] = 1.0f;
    }
    row.whole_from = 0;
    row.reads_means = false;
    report(count, 0);
  }

  void keep_probable() {
    force();
    const int many = g.D * sizeof(T) <= kNarrowRow ? kManyNarrowPercent : kManyPercent;
    const float floor = a.min_mass[row.seq];
    const float threshold = a.log_min_prob[row.seq * a.log_min_prob_stride + row.kv_head] * kLog2E;
    int count = 0, lifts = 0;
    for (;; lifts++) {
      for (int h = 0; h < g.G; h++) set_limits(h, std::log2(total[h]) + threshold - lifts);
      count = g.group_size == 64 ? collect<64>() : g.group_size == 32 ? collect<32>() : collect<16>();
      float least = INFINITY;
      for (int h = 0; h < g.G; h++) {
        kept_mass[h] = std::min(sum_kept(h) / mass[h], 1.0f);
        least = std::min(least, kept_mass[h]);
      }
      if (lifts == kMaxLifts || !(least < floor)) break;
    }
    const bool keeps_many = int64_t{count} * 100 > int64_t{row.visible.end - row.visible.begin} * many;
    row.whole_from = g.group_size * (keeps_many ? many / 2 : kWholePercent) / 100 + 1;
    row.reads_means = false;
    for (int h = 0; h < g.G; h++) weigh(h);
    report(count, lifts);
  }

  // Groups that the row sees in part, and the best key of every head.
  void force() {
    num_forced = 0;
    for (int i = row.groups.begin; i < row.groups.end; i++) {
      if (i == row.whole.begin && row.whole.end > i) i = row.whole.end;
      if (i < row.groups.end) forced[num_forced++] = {i, row.visible_bits(i)};
    }
    for (int h = 0; h < g.G; h++) {
      const float* max = row.max + at(h);
      const int i = static_cast<int>(std::find(max, max + row.stride, top[h]) - max);
      if (i == row.stride) continue;  // scores that are no numbers
      const float* e = row.p_of_group(i) + static_cast<size_t>(h) * g.B;
      const int slot = static_cast<int>(std::find(e, e + g.group_size, 1.0f) - e);
      if (slot < g.group_size) forced[num_forced++] = {i, uint64_t{1} << slot};
    }
  }

  // Exponentials, relative to the largest one of each group, from which a key has the probability
  // 2^threshold / total.
  void set_limits(int h, float threshold) {
    const float* max = row.max + at(h);
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 rel = _mm256_set1_ps(threshold), highest = _mm256_set1_ps(top[h]);
    for (int i = 0; i < row.stride; i += 8) {
      const __m256 below = _mm256_sub_ps(_mm256_load_ps(max + i), highest);
      // At most 2, which no exponential reaches; in this order also where hidden groups make a NaN.
      const __m256 x = _mm256_min_ps(_mm256_sub_ps(rel, below), one);
      _mm256_store_ps(row.limit + at(h) + i, exp2_nonpositive(x));
    }
  }

  // Masks of all groups, and what their kept keys sum up to. Returns the number of kept keys.
  template <int SIZE>
  int collect() {
    std::fill_n(row.mask, row.stride, uint64_t{0});
    std::fill_n(row.kept, g.G * static_cast<size_t>(row.stride), 0.0f);
    for (int i = 0; i < num_forced; i++) row.mask[forced[i].group] |= forced[i].bits;
    const int n = find_candidates();
    int count = 0, lines = kFetchLines;
    for (int c = 0; c < n; c++) {
      if (c + kLookAhead < n) fetch_candidate(row.candidates[c + kLookAhead]);
      const int i = row.candidates[c];
      const int kept = test_group<SIZE>(i);
      if (kept <= kFewKeys && lines > 0) lines -= fetch_kept(i);
      count += kept;
    }
    for (int c = 0; c < n; c++) sum_few(row.candidates[c]);
    return count;
  }

  // Groups whose largest exponential, which is 1, reaches the limit for some head, and those with forced keys.
  int find_candidates() const {
    const __m256 one = _mm256_set1_ps(1.0f);
    int n = 0;
    for (int i = 0; i < row.stride; i += 8) {
      __m256 any = _mm256_setzero_ps();
      for (int h = 0; h < g.G; h++)
        any = _mm256_or_ps(any, _mm256_cmp_ps(_mm256_load_ps(row.limit + at(h) + i), one, _CMP_LE_OQ));
      int bits = _mm256_movemask_ps(any);
      for (int j = 0; j < 8; j++) bits |= (row.mask[i + j] != 0) << j;
      for (; bits; bits &= bits - 1) row.candidates[n++] = i + __builtin_ctz(bits);
    }
    return n;
  }

  // The scan's exponentials have left the nearer caches by now.
  void fetch_candidate(int i) const {
    const float* p = row.p_of_group(i);
    for (int h = 0; h < g.G; h++)
      if (row.limit[at(h) + i] <= 1.0f)
        for (int t = 0; t < g.group_size; t += 16)
          prefetch(reinterpret_cast<const char*>(p + static_cast<size_t>(h) * g.B + t));
  }

  // What the gather will read of a group. Returns the number of lines of V.
  int fetch_kept(int i) const {
    const auto [block, in_block] = g.locate(i);
    const float* p = row.p_of_group(i);
    int lines = 0;
    for (uint64_t bits = row.mask[i]; bits; bits &= bits - 1) {
      const int slot = __builtin_ctzll(bits);
      for (int h = 0; h < g.G; h++) prefetch(reinterpret_cast<const char*>(p + static_cast<size_t>(h) * g.B + slot));
      const T* v = row.v_row(block, in_block * g.group_size + slot);
      for (int i = 0; i < row.v_lines(); i++, lines++)
        LineStream{reinterpret_cast<const char*>(v + i * row.v_line_stride()), false}.fetch(1);
    }
    return lines;
  }

  // Adds the keys of a group that reach the limit of some head to its mask, and sums up the exponentials of its kept
  // keys where those are many. Returns their number.
  template <int SIZE>
  int test_group(int i) {
    constexpr int N = SIZE / 8;
    const float* p = row.p_of_group(i);
    __m256 lanes[N];
    TOPT_UNROLL for (int t = 0; t < N; t++) lanes[t] = _mm256_setzero_ps();
    for (int h = 0; h < g.G; h++) {
      const float limit = row.limit[at(h) + i];
      if (!(limit <= 1.0f)) continue;
      const __m256 least = _mm256_set1_ps(limit);
      TOPT_UNROLL for (int t = 0; t < N; t++)
          lanes[t] = _mm256_or_ps(lanes[t], _mm256_cmp_ps(_mm256_load_ps(p + h * g.B + 8 * t), least, _CMP_GE_OQ));
    }
    uint64_t reaching = 0;
    TOPT_UNROLL for (int t = 0; t < N; t += 4)  // of 16 tokens the upper bits are copies
        reaching |= uint64_t{bits_of(lanes[t], lanes[t + 1], lanes[(t + 2) % N], lanes[(t + 3) % N])} << 8 * t;
    const uint64_t visible = row.visible_bits(i), mask = (reaching & visible) | row.mask[i];
    row.mask[i] = mask;
    const int kept = __builtin_popcountll(mask);
    if (kept <= kFewKeys) return kept;
    if (mask == visible) {
      for (int h = 0; h < g.G; h++) row.kept[at(h) + i] = row.sum[at(h) + i];
      return kept;
    }
    if (mask != reaching) TOPT_UNROLL for (int t = 0; t < N; t++) lanes[t] = lanes_of(mask >> 8 * t);
    for (int h = 0; h < g.G; h++, p += g.B) {
      __m256 sum = _mm256_and_ps(lanes[0], _mm256_load_ps(p)), more = _mm256_and_ps(lanes[1], _mm256_load_ps(p + 8));
      TOPT_UNROLL for (int t = 2; t < N; t += 2) {
        sum = _mm256_add_ps(sum, _mm256_and_ps(lanes[t], _mm256_load_ps(p + 8 * t)));
        more = _mm256_add_ps(more, _mm256_and_ps(lanes[t + 1], _mm256_load_ps(p + 8 * t + 8)));
      }
      row.kept[at(h) + i] = horizontal_sum(_mm256_add_ps(sum, more));
    }
    return kept;
  }

  // The same where it pays to visit the keys one by one; their exponentials are on their way.
  void sum_few(int i) const {
    const uint64_t mask = row.mask[i];
    if (__builtin_popcountll(mask) > kFewKeys) return;
    const float* p = row.p_of_group(i);
    for (int h = 0; h < g.G; h++, p += g.B) {
      float sum = 0;
      for (uint64_t bits = mask; bits; bits &= bits - 1) sum += p[__builtin_ctzll(bits)];
      row.kept[at(h) + i] = sum;
    }
  }

  float sum_kept(int h) const {
    __m256 lanes = _mm256_setzero_ps();
    for (int i = 0; i < row.stride; i += 8)
      lanes = _mm256_fmadd_ps(_mm256_load_ps(row.kept + at(h) + i), _mm256_load_ps(row.scale + at(h) + i), lanes);
    return horizontal_sum(lanes);
  }

  void multiply_scale(int h, float factor) {
    const __m256 f = _mm256_set1_ps(factor);
    float* scale = row.scale + at(h);
    for (int i = 0; i < row.stride; i += 8) _mm256_store_ps(scale + i, _mm256_mul_ps(f, _mm256_load_ps(scale + i)));
  }

  // Weights of a head's kept keys and of the means for what it lost; `limit` becomes the latter.
  void weigh(int h) {
    const float* w = a.weights + static_cast<size_t>(row.kv_head * g.G + h) * kNumWeights;
    float* means = row.limit + at(h);
    const float share = 1.0f / total[h];
    std::fill_n(means, row.stride, 0.0f);
    if (w[2] != 0 || w[3] != 0 || w[4] != 0) {
      float lost_of_all = 0;
      for (int i = row.whole.begin; i < row.whole.end; i++) {
        const size_t j = at(h) + i;
        means[i] = std::max(row.sum[j] - row.kept[j], 0.0f) * row.scale[j] * share;
        lost_of_all += means[i];
      }
      if (lost_of_all > 0) {
        row.reads_means = true;
        const float for_each = w[4] * lost_of_all / (row.whole.end - row.whole.begin);
        const int per_long = kLongGroup / g.group_size;
        const int before = row.first_block * g.groups_per_block % per_long;  // of the first page's long group
        for (int i = row.whole.begin; i < row.whole.end;) {
          const int end = std::min((i + before) / per_long * per_long + per_long - before, row.whole.end);
          float lost = 0;
          for (int j = i; j < end; j++) lost += means[j];
          const float add = w[3] * lost / (end - i) + for_each;
          for (; i < end; i++) means[i] = w[2] * means[i] + add;
        }
      }
    }
    multiply_scale(h, (w[0] + w[1] / kept_mass[h]) * share);
  }

  void report(int count, int lifts) {
    const size_t i = static_cast<size_t>(row.seq) * a.num_kv_heads + row.kv_head;
    a.num_kept[i] = count;
    a.lifts[i] = lifts;
    std::copy_n(kept_mass, g.G, a.kept_mass + i * g.G);
  }
};

}  // namespace topt
