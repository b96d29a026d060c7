// Decode attention over the paged cache, of every query head to the keys that have enough probability: how work is cut,
// and how parts become rows.
//
// A row is one (sequence, kv head): scan, select, gather (row.h). One that fits a task is computed at once, while its
// scores are in cache. The others are cut twice, by pages for the scan and by V rows for the gather; whoever finishes
// the last part of a scan selects, and whoever finishes the last part of a gather adds the parts, in their order. The
// last rows of a sequence, one a thread, are scanned side by side, so that their selections are, too.
#include <omp.h>

#include "gather.h"
#include "scan.h"

namespace topt {
namespace {

constexpr int kMinSplitTokens = 256;             // shorter tasks cost more to start than they take
constexpr int kTasksPerThread = 4;               // fine enough that a disturbed core does not hold up the others
constexpr int64_t kMinParallelWork = 32 * 1024;  // key elements below which waking threads does not pay

thread_local Arena caller_arena, worker_arena;

template <class T>
class Decoder {
 public:
  explicit Decoder(const ToptDecodeArgs& args) : a(args), g(args) {}

  int32_t run() {
    int num_threads = a.num_threads > 0 ? a.num_threads : omp_get_max_threads();
    if (!plan(num_threads)) return kOutOfMemory;
    int32_t status = kOk, late_status = kOk;  // two: all threads must decide alike whether there is a second half
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < num_tasks; i++) {
        const int32_t result = first_half(i);
        if (result != kOk) __atomic_store_n(&status, result, __ATOMIC_RELAXED);
      }
      if (num_split_rows > 0 && __atomic_load_n(&status, __ATOMIC_RELAXED) == kOk) {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < num_tasks; i++)
          if (!second_half(i)) __atomic_store_n(&late_status, kOutOfMemory, __ATOMIC_RELAXED);
      }
    }
    return status != kOk ? status : late_status;
  }

 private:
  // A row that is cut into tasks.
  struct SplitRow {
    Row<T> row;
    int32_t unscanned, ungathered;  // parts that have not reported
    float* accs;                    // [splits][G][D]
  };

  // Task i is part `part` of `splits` of a row.
  struct Task {
    int seq, kv_head, part, splits;
    SplitRow* split;  // null where the row is one task
  };

  const ToptDecodeArgs& a;
  const Geometry<T> g;
  int num_tasks = 0, num_split_rows = 0;
  int heads_abreast = 1;  // of a sequence, its last ones
  int32_t* first_task = nullptr;   // [num_seqs + 1]
  int32_t* first_split = nullptr;  // [num_seqs] split rows of earlier sequences
  SplitRow* split_rows = nullptr;
  size_t worker_bytes = 0;

  // Cuts the rows into tasks of about equal size and lays out what split rows share.
  bool plan(int& num_threads) {
    int64_t work = 0;
    for (int s = 0; s < a.num_seqs; s++) work += int64_t{g.num_blocks(g.span(s))} * a.num_kv_heads;
    if (a.num_threads <= 0 && work * g.B * g.D < kMinParallelWork) num_threads = 1;
    heads_abreast = std::min(num_threads, a.num_kv_heads);
    const int64_t target = num_threads == 1 ? work : work / (int64_t{num_threads} * kTasksPerThread) + 1;
    const int64_t per_task = std::max<int64_t>({target, kMinSplitTokens / g.B, 1});
    const auto splits = [&](int seq) -> int {
      const int blocks = g.num_blocks(g.span(seq));
      const int64_t wanted = a.num_splits > 0 ? a.num_splits : (blocks + per_task - 1) / per_task;
      return static_cast<int>(std::max<int64_t>(std::min<int64_t>(wanted, blocks), 1));
    };
    const size_t acc = static_cast<size_t>(g.G) * g.D;
    size_t shared = 0;
    int longest = 0;
    for (int s = 0; s < a.num_seqs; s++) {
      const int n = splits(s), blocks = g.num_blocks(g.span(s));
      if (n == 1) {
        longest = std::max(longest, blocks);
        continue;
      }
      num_split_rows += a.num_kv_heads;
      shared += a.num_kv_heads * (Row<T>::bytes(g, blocks) + Arena::bytes_for<float>(n * acc));
    }
    worker_bytes = Row<T>::bytes(g, longest) + Scan<T>::bytes(g) + Select<T>::bytes(g) + Gather<T>::bytes(g) +
                   Arena::bytes_for<float>(acc);
    if (!caller_arena.reserve(Arena::bytes_for<int32_t>(a.num_seqs + 1) + Arena::bytes_for<int32_t>(a.num_seqs) +
                              Arena::bytes_for<SplitRow>(num_split_rows) + shared))
      return false;
    first_task = caller_arena.take<int32_t>(a.num_seqs + 1);
    first_split = caller_arena.take<int32_t>(a.num_seqs);
    split_rows = caller_arena.take<SplitRow>(num_split_rows);
    SplitRow* next = split_rows;
    for (int s = 0; s < a.num_seqs; s++) {
      const int n = splits(s);
      first_task[s] = num_tasks;
      first_split[s] = static_cast<int32_t>(next - split_rows);
      num_tasks += n * a.num_kv_heads;
      if (n == 1) continue;
      for (int h = 0; h < a.num_kv_heads; h++, next++) {
        new (next) SplitRow{Row<T>(g, s, h), n, n, nullptr};
        next->row.take_buffers(caller_arena);
        next->accs = caller_arena.take<float>(n * acc);
      }
    }
    first_task[a.num_seqs] = num_tasks;
    return true;
  }

  Task task(int index) const {
    int seq = 0;
    for (int high = a.num_seqs; high - seq > 1;) {  // the last sequence whose first task is not after this one
      const int middle = (seq + high) / 2;
      (first_task[middle] <= index ? seq : high) = middle;
    }
    const int splits = (first_task[seq + 1] - first_task[seq]) / a.num_kv_heads, local = index - first_task[seq];
    const int before = a.num_kv_heads - heads_abreast, abreast = local - before * splits;
    const int kv_head = abreast < 0 ? local / splits : before + abreast % heads_abreast;
    const int part = abreast < 0 ? local % splits : abreast / heads_abreast;
    return {seq, kv_head, part, splits, splits > 1 ? split_rows + first_split[seq] + kv_head : nullptr};
  }

  int32_t first_half(int index) const {
    const Task t = task(index);
    if (!worker_arena.reserve(worker_bytes)) return kOutOfMemory;
    if (t.split) {
      Row<T>& row = t.split->row;
      const auto cut = [&](int part) { return static_cast<int>(int64_t{row.num_blocks} * part / t.splits); };
      const int begin = cut(t.part), end = cut(t.part + 1);
      const bool valid = row.has_blocks(begin, end);
      if (valid) Scan<T>(row, worker_arena).run(begin, end);
      if (__atomic_sub_fetch(&t.split->unscanned, 1, __ATOMIC_ACQ_REL) == 0) {
        Select<T> select(row, worker_arena);
        select.run();
        select.count_rows();
      }
      return valid ? kOk : kBlockOutOfRange;
    }
    Row<T> row(g, t.seq, t.kv_head);
    if (row.num_blocks == 0) {
      write_padding(t);
      return kOk;
    }
    if (!row.has_blocks(0, row.num_blocks)) return kBlockOutOfRange;
    row.take_buffers(worker_arena);
    Scan<T>(row, worker_arena).run(0, row.num_blocks);
    Select<T>(row, worker_arena).run();
    float* acc = worker_arena.take<float>(static_cast<size_t>(g.G) * g.D);
    Gather<T>(row, worker_arena, acc).run(0, row.stride);
    write(t, acc);
    return kOk;
  }

  // False when out of memory.
  bool second_half(int index) const {
    const Task t = task(index);
    if (!t.split) return true;
    if (!worker_arena.reserve(worker_bytes)) return false;
    const Row<T>& row = t.split->row;
    const size_t size = static_cast<size_t>(g.G) * g.D;
    const int32_t* before = row.rows_before;
    const auto cut = [&](int part) {
      const int64_t rows = int64_t{before[row.stride]} * part / t.splits;
      return static_cast<int>(std::lower_bound(before, before + row.stride + 1, rows) - before);
    };
    Gather<T>(row, worker_arena, t.split->accs + t.part * size).run(cut(t.part), cut(t.part + 1));
    if (__atomic_sub_fetch(&t.split->ungathered, 1, __ATOMIC_ACQ_REL) != 0) return true;
    float* sum = t.split->accs;
    for (int i = 1; i < t.splits; i++)
      for (size_t d = 0; d < size; d += 8)
        _mm256_store_ps(sum + d, _mm256_add_ps(_mm256_load_ps(sum + d), _mm256_load_ps(sum + i * size + d)));
    write(t, sum);
    return true;
  }

  T* out(const Task& t) const {
    return static_cast<T*>(a.out) + t.seq * a.out_stride + static_cast<size_t>(t.kv_head) * g.G * g.D;
  }

  void write(const Task& t, float* acc) const {
    for (int h = 0; h < g.G; h++) {
      float* sum = acc + static_cast<size_t>(h) * g.D;
      T* to = out(t) + static_cast<size_t>(h) * g.D;
      (g.wide ? unpermute_row_avx512<T> : unpermute_row<T>)(sum, g.D);
      for (int d = 0; d < g.D; d += 16)
        Elem<T>::store16(to + d, _mm256_load_ps(sum + d), _mm256_load_ps(sum + d + 8));
    }
  }

  void write_padding(const Task& t) const {
    const size_t row = static_cast<size_t>(t.seq) * a.num_kv_heads + t.kv_head;
    std::memset(out(t), 0, sizeof(T) * g.G * g.D);
    a.num_kept[row] = a.lifts[row] = 0;
    std::fill_n(a.kept_mass + row * g.G, g.G, 1.0f);
  }
};

}  // namespace
}  // namespace topt

int32_t topt_decode_avx2(const ToptDecodeArgs& args) {
  switch (args.dtype) {
    case kBFloat16:
      return args.amx ? topt::Decoder<topt::tiled_bf16>(args).run() : topt::Decoder<topt::bf16>(args).run();
    case kFloat16: return topt::Decoder<topt::fp16>(args).run();
    case kFloat32: return topt::Decoder<float>(args).run();
  }
  return kUnsupportedDtype;
}
