// The contract between Python (kernels/cpu/prefill.py mirrors the struct field by field) and the prompts' kernel.
#pragma once

#include <cstdint>

struct ToptPrefillArgs {
  const void* query;               // [num_tokens][num_heads][head_dim], row stride query_stride
  const void* kv_cache;            // pages at block * block_stride + kv_head * head_stride, as for decode
  const int32_t* block_table;      // [num_seqs][...], row stride block_table_stride
  const int32_t* query_start_loc;  // [num_seqs + 1], first token of each sequence
  const int32_t* seq_lens;         // [num_seqs] cached keys, those of the queries included
  const float* log_min_prob;       // [num_tokens][num_kv_heads], row stride log_min_prob_stride; natural logarithm
  const uint8_t* dense;            // [num_tokens], nonzero: no pruning
  const float* sinks;              // [num_heads] or null
  void* out;                       // [num_tokens][num_heads][head_dim], row stride out_stride
  int32_t* num_kept;               // [num_tokens][num_kv_heads] keys that the heads of the group keep together
  int32_t* v_tiles_read;           // [num_tokens][num_kv_heads] runs of 64 keys with a kept one
  float* kept_mass;                // [num_tokens][num_heads] their share of the probability of all keys
  int64_t query_stride, out_stride, block_stride, head_stride, block_table_stride;  // elements
  int64_t log_min_prob_stride, num_blocks;
  int32_t max_blocks;  // entries in a row of the block table
  int32_t num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, block_size;
  int32_t group_size;   // tokens per compensation group
  int32_t amx;          // nonzero: K and V lie in AMX tiles
  int32_t window;       // a row sees its last `window` keys; 0: all
  int32_t dtype;        // ToptDtype
  int32_t num_threads;  // 0: what OpenMP would use
  int32_t avx512;       // nonzero: the CPU has it and it is to be used
  float sm_scale;
  float soft_cap;  // 0: none
};

int32_t topt_prefill_avx2(const ToptPrefillArgs& args);
