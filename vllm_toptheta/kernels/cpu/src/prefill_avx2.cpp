// Prefill attention with Top-theta pruning over the paged cache: how work is cut.
//
// A task is a tile of query tokens of one sequence with all query heads of one kv head. Tiles are cut at absolute
// positions and lie in one key tile each.
#include <omp.h>

#include "prefill_tile.h"

namespace topt {
namespace {

constexpr int kTileFloats = 24 * 1024;  // of the queries of a task: what the L2 cache holds beside K and V
constexpr int kMinTileRows = 48, kMaxTileRows = 192;
constexpr int64_t kMinParallelPairs = 16 * 1024;  // query-key pairs below which waking threads does not pay

thread_local Arena caller_arena, worker_arena;

template <class T>
class Prefiller {
 public:
  explicit Prefiller(const ToptPrefillArgs& args) : a(args), attention(args) {
    const int rows = std::clamp(kTileFloats / a.head_dim, kMinTileRows, kMaxTileRows);
    const int most = std::max(rows / (a.num_heads / a.num_kv_heads), 1);
    tiles_per_key_tile = (kKeyTile + most - 1) / most;
    tile_tokens = (kKeyTile + tiles_per_key_tile - 1) / tiles_per_key_tile;
  }

  int32_t run() {
    if (a.query_start_loc[0] != 0 || a.query_start_loc[a.num_seqs] != a.num_tokens) return kBadLengths;
    if (!caller_arena.reserve(Arena::bytes_for<int32_t>(a.num_seqs + 1))) return kOutOfMemory;
    first_tile = caller_arena.take<int32_t>(a.num_seqs + 1);
    first_tile[0] = 0;
    int64_t pairs = 0;
    for (int s = 0; s < a.num_seqs; s++) {
      const int tokens = num_tokens(s), len = a.seq_lens[s];
      if (tokens < 0 || tokens > len) return kBadLengths;
      first_tile[s + 1] = first_tile[s] + (tokens > 0 ? tile_of(len - 1) - tile_of(len - tokens) + 1 : 0);
      pairs += int64_t{tokens} * len * a.num_heads;
    }
    int num_threads = a.num_threads > 0 ? a.num_threads : omp_get_max_threads();
    if (a.num_threads <= 0 && pairs < kMinParallelPairs) num_threads = 1;
    const int num_tasks = first_tile[a.num_seqs] * a.num_kv_heads;
    int32_t status = kOk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)
    for (int i = 0; i < num_tasks; i++) {
      // From the last tile to the first: the last ones see the most keys, and long tasks should not come last.
      const int task = num_tasks - 1 - i;
      const int32_t result = run_task(task / a.num_kv_heads, task % a.num_kv_heads);
      if (result != kOk) __atomic_store_n(&status, result, __ATOMIC_RELAXED);
    }
    return status;
  }

 private:
  const ToptPrefillArgs& a;
  PrefillTile<T> attention;
  int tiles_per_key_tile, tile_tokens;
  int32_t* first_tile = nullptr;  // [num_seqs + 1]

  int num_tokens(int seq) const { return a.query_start_loc[seq + 1] - a.query_start_loc[seq]; }
  // Tiles of tokens, counted from the start of the sequence, and their first positions.
  int tile_of(int position) const {
    return position / kKeyTile * tiles_per_key_tile + position % kKeyTile / tile_tokens;
  }
  int start_of(int tile) const {
    return tile / tiles_per_key_tile * kKeyTile + std::min(tile % tiles_per_key_tile * tile_tokens, kKeyTile);
  }

  int32_t run_task(int tile, int kv_head) const {
    int seq = 0;
    for (int high = a.num_seqs; high - seq > 1;) {  // the last sequence whose first tile is not after this one
      const int middle = (seq + high) / 2;
      (first_tile[middle] <= tile ? seq : high) = middle;
    }
    const int len = a.seq_lens[seq], cached = len - num_tokens(seq);
    const int in_seq = tile_of(cached) + tile - first_tile[seq];
    const int begin = std::max(start_of(in_seq), cached), end = std::min(start_of(in_seq + 1), len);
    typename PrefillTile<T>::Task t;
    t.seq = seq;
    t.kv_head = kv_head;
    t.token = a.query_start_loc[seq] + begin - cached;
    t.num_tokens = end - begin;
    t.first_len = begin + 1;
    return attention.run(t, worker_arena);
  }
};

}  // namespace
}  // namespace topt

int32_t topt_prefill_avx2(const ToptPrefillArgs& args) {
  switch (args.dtype) {
    case kBFloat16: return topt::Prefiller<topt::bf16>(args).run();
    case kFloat16: return topt::Prefiller<topt::fp16>(args).run();
    case kFloat32: return topt::Prefiller<float>(args).run();
  }
  return kUnsupportedDtype;
}
