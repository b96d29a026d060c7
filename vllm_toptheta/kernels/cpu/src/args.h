// The contract between Python (kernels/cpu/native.py mirrors these structs field by field) and the native kernels.
//
// A page is what one (block, kv head) pair owns in the cache, contiguous, all in the cache dtype:
//   K^T [head_dim][block_size], V [block_size][head_dim], V means [block_size / group_size][head_dim],
// or, in AMX tiles (bf16, block_size and head_dim multiples of 32):
//   K [block_size / 16][head_dim / 2][16 tokens][2], V [head_dim / 16][block_size / 2][16][2 tokens], the same means.
#pragma once

#include <cstdint>

enum ToptDtype : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

enum ToptStatus : int32_t {
  kOk = 0,
  kUnsupportedDtype = 1,
  kBlockOutOfRange = 2,  // a block table entry or a slot lies outside the cache
  kOutOfMemory = 3,
  kBadLengths = 4,  // query_start_loc does not cover the tokens, or a sequence has more queries than keys
};

struct ToptDecodeArgs {
  const void* query;           // [num_seqs][num_heads][head_dim], row stride query_stride
  const void* kv_cache;        // pages at block * block_stride + kv_head * head_stride
  const int32_t* block_table;  // [num_seqs][...], row stride block_table_stride
  const int32_t* seq_lens;     // [num_seqs]
  const float* log_min_prob;   // [num_seqs][num_kv_heads], row stride log_min_prob_stride; natural logarithm
  const float* min_mass;       // [num_seqs]
  const uint8_t* dense;        // [num_seqs], nonzero: no pruning
  const float* weights;        // [num_heads][kNumWeights] of the compensation
  const float* sinks;          // [num_heads] or null
  void* out;                   // [num_seqs][num_heads][head_dim], row stride out_stride
  int32_t* num_kept;           // [num_seqs][num_kv_heads] keys on the list
  float* kept_mass;            // [num_seqs][num_heads] their share of the probability of all keys
  int32_t* lifts;              // [num_seqs][num_kv_heads] how often min_mass halved the threshold
  int64_t query_stride, out_stride, block_stride, head_stride, block_table_stride;  // elements
  int64_t log_min_prob_stride, num_blocks;
  int32_t max_blocks;  // entries in a row of the block table
  int32_t num_seqs, num_heads, num_kv_heads, head_dim, block_size;
  int32_t group_size;   // tokens per short compensation group: 16, 32 or 64
  int32_t amx;          // nonzero: K and V lie in AMX tiles
  int32_t window;       // a row sees its last `window` keys; 0: all
  int32_t dtype;        // ToptDtype
  int32_t num_splits;   // parts of a row; 0: chosen from the work
  int32_t num_threads;  // 0: what OpenMP would use
  int32_t avx512;       // nonzero: the CPU has it (topt_avx512_supported) and it is to be used
  float sm_scale;
  float soft_cap;  // 0: none
};

struct ToptMeansArgs {
  void* kv_cache;
  const int64_t* slot_mapping;  // [num_tokens], negative: padding
  int64_t num_tokens, num_blocks, block_stride, head_stride;
  int32_t num_kv_heads, head_dim, block_size, group_size, amx, dtype;
};

int32_t topt_decode_avx2(const ToptDecodeArgs& args);
int32_t topt_update_v_means_avx2(const ToptMeansArgs& args);
