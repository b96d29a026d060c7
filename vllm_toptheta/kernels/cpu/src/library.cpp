// The exported C functions. This file is compiled for the baseline ISA, so that an old CPU can ask what it may run.
#include "args.h"
#include "prefill_args.h"

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Changes with every change of the structs; Python refuses another number.
EXPORT int32_t topt_abi_version() { return 7; }

EXPORT int32_t topt_cpu_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

EXPORT int32_t topt_avx512_supported() {
#ifdef TOPT_EMULATE_AVX512
  return 1;
#else
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") != 0;
#endif
}

// Products of 8-bit numbers, which make scans of the sketch fast.
EXPORT int32_t topt_vnni_supported() {
#ifdef TOPT_EMULATE_AVX512
  return 0;
#else
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
#endif
}

EXPORT int32_t topt_decode(const ToptDecodeLayer* layer, const ToptDecodeRows* rows, const void* query, void* out) {
  return topt_decode_avx2({*layer, *rows, query, out});
}

EXPORT int32_t topt_prefill(const ToptPrefillArgs* args) { return topt_prefill_avx2(*args); }

EXPORT int32_t topt_update_side_data(const ToptSideDataArgs* args) { return topt_update_side_data_avx2(*args); }

}  // extern "C"
