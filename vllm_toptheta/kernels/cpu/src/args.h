// The contract between Python (kernels/cpu/native.py mirrors these structs field by field) and the native kernels.
//
// A page is what one (block, kv head) pair owns in the cache, contiguous, all in the cache dtype:
//   K^T [head_dim][block_size], V [block_size][head_dim], V means [block_size / group_size][head_dim],
// where the cache has one the sketch of K (sketch.h);
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

// What a layer is, step after step.
struct ToptDecodeLayer {
  const void* kv_cache;  // pages at block * block_stride + kv_head * head_stride
  const float* weights;  // [num_heads][kNumWeights] of the compensation
  const float* sinks;    // [num_heads] or null
  int64_t query_stride, out_stride, block_stride, head_stride, num_blocks;  // strides in elements
  int32_t slot;          // the layer's place in what a step's layers share
  int32_t num_heads, num_kv_heads, head_dim, block_size;
  int32_t group_size;   // tokens per short compensation group: 16, 32 or 64
  int32_t amx;          // nonzero: K and V lie in AMX tiles
  int32_t sketch;       // nonzero: pages hold a sketch of K
  int32_t window;       // a row sees its last `window` keys; 0: all
  int32_t dtype;        // ToptDtype
  int32_t num_splits;   // parts of a row; 0: chosen from the work
  int32_t num_threads;  // 0: what OpenMP would use
  int32_t avx512;       // nonzero: the CPU has it (topt_avx512_supported) and it is to be used
  float sm_scale;
  float soft_cap;  // 0: none
};

// The rows of a step, for all layers.
struct ToptDecodeRows {
  const int32_t* block_table;  // [num_seqs][...], row stride block_table_stride
  const int32_t* seq_lens;     // [num_seqs]
  const float* log_min_prob;   // [layers][num_seqs][num_kv_heads], the first two strides as below; natural logarithm
  const float* min_mass;       // [num_seqs]
  const uint8_t* dense;        // [layers][num_seqs], nonzero: no pruning
  int32_t* num_kept;           // [layers][num_seqs][num_kv_heads] keys on the list
  float* kept_mass;            // [layers][num_seqs][num_heads] their share of the probability of all keys
  int32_t* lifts;              // [layers][num_seqs][num_kv_heads] how often min_mass halved the threshold
  int64_t block_table_stride, log_min_prob_layer_stride, log_min_prob_stride;  // elements
  int32_t max_blocks;  // entries in a row of the block table
  int32_t num_seqs;
};

// One layer's call; pointers of the rows are those of the layer.
struct ToptDecodeArgs : ToptDecodeLayer, ToptDecodeRows {
  const void* query;  // [num_seqs][num_heads][head_dim], row stride query_stride
  void* out;          // the same, row stride out_stride

  ToptDecodeArgs(const ToptDecodeLayer& layer, const ToptDecodeRows& rows, const void* query, void* out)
      : ToptDecodeLayer(layer), ToptDecodeRows(rows), query(query), out(out) {
    const int64_t before = int64_t{slot} * num_seqs;
    log_min_prob += slot * log_min_prob_layer_stride;
    dense += before;
    num_kept += before * num_kv_heads;
    lifts += before * num_kv_heads;
    kept_mass += before * num_heads;
  }
};

struct ToptSideDataArgs {
  void* kv_cache;
  const int64_t* slot_mapping;  // [num_tokens], negative: padding
  int64_t num_tokens, num_blocks, block_stride, head_stride;
  int32_t num_kv_heads, head_dim, block_size, group_size, amx, sketch, dtype;
};

extern "C" int32_t topt_vnni_supported();
int32_t topt_decode_avx2(const ToptDecodeArgs& args);
int32_t topt_update_side_data_avx2(const ToptSideDataArgs& args);
