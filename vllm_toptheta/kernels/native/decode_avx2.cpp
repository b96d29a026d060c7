// Decode attention with Top-theta pruning over the paged cache: how work is cut, and how parts become rows.
//
// A task is a run of pages of one (row, kv head). It leaves a partial result (running maximum, sum of exponentials,
// weighted V sum, counts) per query head; whoever finishes the last task of a (row, kv head) merges them.
#include <omp.h>

#include "attend_avx2.h"

namespace topt {
namespace {

constexpr int kMinSplitTokens = 256;             // shorter tasks cost more to start than they take
constexpr int kTasksPerThread = 8;               // fine enough that a disturbed core does not hold up the others
constexpr int64_t kMinParallelWork = 32 * 1024;  // key elements below which waking threads does not pay

thread_local Arena caller_arena, worker_arena;

// One call: the tasks and their partial results.
template <class T>
class Decoder : PageAttention<T> {
  using Base = PageAttention<T>;
  using Task = typename Base::Task;
  using Base::a, Base::B, Base::D, Base::G;

 public:
  explicit Decoder(const ToptDecodeArgs& args) : Base(args) {}

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
  int num_tasks = 0;
  int32_t* first_task = nullptr;  // [num_seqs + 1]
  int32_t* unfinished = nullptr;  // [num_seqs][num_kv_heads] tasks that have not reported
  HeadState* states = nullptr;    // [num_tasks][G]
  float* accs = nullptr;          // [num_tasks][G][D]
  int32_t* unions = nullptr;      // [num_tasks] V rows kept by any head

  int num_splits(int seq) const { return (first_task[seq + 1] - first_task[seq]) / a.num_kv_heads; }

  // Cuts the rows into tasks of about equal size and lays out the partial results.
  bool plan(int& num_threads) {
    int64_t work = 0;
    for (int s = 0; s < a.num_seqs; s++) work += int64_t{this->num_blocks(this->span(s))} * a.num_kv_heads;
    if (a.num_threads <= 0 && work * B * D < kMinParallelWork) num_threads = 1;
    const int64_t target = num_threads == 1 ? work : work / (int64_t{num_threads} * kTasksPerThread) + 1;
    const int64_t per_task = std::max<int64_t>({target, kMinSplitTokens / B, 1});
    const auto splits = [&](int seq) -> int64_t {
      const int blocks = this->num_blocks(this->span(seq));
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

  int32_t run_task(int index) const {
    int seq = 0;
    for (int high = a.num_seqs; high - seq > 1;) {  // the last sequence whose first task is not after this one
      const int middle = (seq + high) / 2;
      (first_task[middle] <= index ? seq : high) = middle;
    }
    const int splits = num_splits(seq), local = index - first_task[seq];
    const int kv_head = local / splits, split = local % splits;
    Task t;
    if (!this->take_scratch(t, worker_arena)) return kOutOfMemory;
    t.seq = seq;
    t.kv_head = kv_head;
    t.span = this->span(seq);
    t.dense = a.dense[seq] != 0;
    t.state = states + static_cast<size_t>(index) * G;
    t.acc = accs + static_cast<size_t>(index) * G * D;
    t.num_union = 0;
    const int64_t blocks = this->num_blocks(t.span);
    const auto cut = [&](int part) { return this->first_block(t.span) + static_cast<int>(blocks * part / splits); };
    const int32_t status = this->attend(t, cut(split), cut(split + 1));
    unions[index] = t.num_union;
    if (__atomic_sub_fetch(unfinished + seq * a.num_kv_heads + kv_head, 1, __ATOMIC_ACQ_REL) == 0 && status == kOk)
      merge(t, index - split, splits);
    return status;
  }

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
      (this->wide ? unpermute_row_avx512<T> : unpermute_row<T>)(total, D);
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
    const T* here = this->page(table[block], t.kv_head);
    const T* v = this->v_of(here);
    add_scaled(total, v + static_cast<size_t>(slot) * D, D, p);
    if (!a.compensation) return;
    const Span visible = {std::max(t.span.begin - block * B, 0), std::min(t.span.end - block * B, B)};
    const int index = slot / a.group_size;
    const Span group = this->group_of(index, visible);
    if (group.end - group.begin == a.group_size) {
      add_scaled(total, this->means_of(here) + static_cast<size_t>(index) * D, D, -p);
      return;
    }
    for (int i = group.begin; i < group.end; i++)
      add_scaled(total, v + static_cast<size_t>(i) * D, D, -p / (group.end - group.begin));
  }
};

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
