// What one task of the prompts' kernel works on: query tokens x heads of one kv head.
#pragma once

#include "prefill_tiles_avx512.h"

namespace topt {

constexpr int kVTile = 64;  // keys of a V tile: one word of kept bits

// Keys of the two V tiles of a key tile, one bit each.
using KeyBits = uint64_t[2];

// What a row knows so far. Scores are in units of log2, masses in units of exp2(max).
struct PrefillRow {
  float max, sum;  // of the real keys
  float sink;      // mass of the sink
  float kept;      // mass of the kept keys
  float in_tile;   // mass of the key tile
};

struct PrefillToken {
  float min_prob;
  bool dense;
  bool lacks;  // it does not keep all that it sees of this key tile
  int32_t num_kept, v_tiles;
  KeyBits seen, kept;  // in this key tile
};

template <class T>
struct PrefillTask {
  int seq, kv_head;
  int token;       // first token of the tile in the batch
  int num_tokens;
  int first_len;   // keys in the cache up to the first token, its own included
  int num_rows;
  const int32_t* table;  // the sequence's blocks
  PrefillToken* tokens;
  PrefillRow* rows;
  float* q;         // blocks of [D][rows of the block]
  float* acc;       // [rows][D], in the order of `pack_row`
  float* p;         // [rows][kWeights] scores, then exponentials; then the lost mass of the key tile's groups
  float* lanes;     // [kUnits][8] exponentials of a row, not yet summed
  float* limits;    // [G] exponentials that a token's rows keep
  float* keys;      // [kUnits][D][16]
  float* values;    // [kWeights][v_stride] V rows that some token reads; then the means of the groups
  KeyBits wanted;   // V rows that are being fetched
  KeyBits packed;   // V rows that `values` holds
  const T* v_units[kUnits];  // where the V rows of 16 keys start
  int32_t listed[kWeights];  // rows of `values` that a token adds up
};

}  // namespace topt
