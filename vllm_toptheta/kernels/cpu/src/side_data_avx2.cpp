// What pages hold beside K and V, of every group of tokens that a cache write has completed: the mean V, and the sketch
// of K.
#include <cmath>

#include "arena.h"
#include "sketch.h"
#include "tiles_amx.h"

namespace topt {
namespace {

thread_local Arena arena;

template <class T>
struct Writer {
  const ToptSideDataArgs& a;
  const int D = a.head_dim, B = a.block_size, size = a.group_size, groups = B / size;

  void mean_of_values(T* page, int group) const {
    const T* v = page + static_cast<size_t>(B) * D + group * size * (kTiled<T> ? 16 : D);
    T* mean = page + static_cast<size_t>(2 * B + group) * D;
    const __m256 share = _mm256_set1_ps(1.0f / size);
    for (int d = 0; d < D; d += 16) {
      __m256 a0 = _mm256_setzero_ps(), a1 = a0;
      for (int r = 0; r < size; r++) {
        __m256 x, y;
        if constexpr (kTiled<T>)
          load16(TiledRow{v + r / 2 * 32 + r % 2, 16 * B}, d, x, y);
        else
          load16(v + static_cast<size_t>(r) * D, d, x, y);
        a0 = _mm256_add_ps(a0, x);
        a1 = _mm256_add_ps(a1, y);
      }
      Elem<T>::unpermute(a0, a1);
      Elem<T>::store16(mean + d, _mm256_mul_ps(a0, share), _mm256_mul_ps(a1, share));
    }
  }

  // Keys of sixteen tokens as x[head_dim][16].
  void load_keys(const T* page, int slot, float* x) const {
    for (int d = 0; d < D; d++) {
      __m256 lo, hi;
      if constexpr (kTiled<T>) {
        const __m256i* pairs =
            reinterpret_cast<const __m256i*>(page + static_cast<size_t>(slot) * D + d / 2 * 32);
        const __m256i p = _mm256_loadu_si256(pairs), q = _mm256_loadu_si256(pairs + 1);
        lo = d % 2 ? Elem<T>::second(p) : Elem<T>::first(p);
        hi = d % 2 ? Elem<T>::second(q) : Elem<T>::first(q);
      } else {
        load16_natural(page + static_cast<size_t>(d) * B + slot, lo, hi);
      }
      _mm256_store_ps(x + 16 * d, lo);
      _mm256_store_ps(x + 16 * d + 8, hi);
    }
  }

  // Returns false when out of memory.
  bool sketch_keys(T* page, int group) const {
    const size_t tile = static_cast<size_t>(D) * 16;
    if (!arena.reserve(Arena::bytes_for<float>(tile) + Arena::bytes_for<float>(D))) return false;
    float *x = arena.take<float>(tile), *centre = arena.take<float>(D);
    const SketchPage<T> sketch(page, D, B, groups);
    const int first = group * size;
    std::fill_n(centre, D, 0.0f);
    for (int t = 0; t < size; t += 16) {
      load_keys(page, first + t, x);
      for (int d = 0; d < D; d++)
        centre[d] += horizontal_sum(_mm256_add_ps(_mm256_load_ps(x + 16 * d), _mm256_load_ps(x + 16 * d + 8)));
    }
    T* stored = sketch.centres + static_cast<size_t>(group) * D;
    const __m256 share = _mm256_set1_ps(1.0f / size);
    for (int d = 0; d < D; d += 16) {
      __m256 lo = _mm256_mul_ps(_mm256_load_ps(centre + d), share);
      __m256 hi = _mm256_mul_ps(_mm256_load_ps(centre + d + 8), share);
      Elem<T>::store16(stored + d, lo, hi);
      load16_natural(stored + d, lo, hi);  // as it is read
      _mm256_store_ps(centre + d, lo);
      _mm256_store_ps(centre + d + 8, hi);
    }
    SketchBound worst = {0, 0};
    for (int t = first; t < first + size; t += 16) {
      load_keys(page, t, x);
      for (int d = 0; d < D; d++)
        for (int i = 0; i < 16; i++) x[16 * d + i] -= centre[d];
      rotate<16>(x, D);
      encode(x, sketch.codes + static_cast<size_t>(t) * D, sketch.scales + t, worst);
    }
    sketch.bounds[group] = {std::sqrt(worst.error) * 1.00001f, std::sqrt(worst.length) * 1.00001f};
    return true;
  }

  // Codes and scales of sixteen tokens from x[head_dim][16]; `worst` takes squares of norms.
  void encode(const float* x, uint8_t* codes, uint16_t* scales, SketchBound& worst) const {
    alignas(64) float largest[16] = {}, scale[16], inverse[16], error[16] = {}, length[16] = {};
    for (int d = 0; d < D; d++)
      for (int i = 0; i < 16; i++) largest[i] = std::max(largest[i], std::fabs(x[16 * d + i]));
    for (int i = 0; i < 16; i++) {
      const float exact = std::max(largest[i] / 127.0f, 1e-30f);
      uint32_t bits;
      std::memcpy(&bits, &exact, 4);
      scales[i] = static_cast<uint16_t>((bits + 0xffff) >> 16);  // up, so that no code exceeds 127
      scale[i] = bf16_to_float(scales[i]);
      inverse[i] = 1.0f / scale[i];
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(codes);  // [head_dim / 4][16]
    for (int d = 0; d < D; d += 4) {
      alignas(64) uint32_t word[16] = {};
      for (int j = 0; j < 4; j++)
        for (int i = 0; i < 16; i++) {
          const float y = x[16 * (d + j) + i], code = std::nearbyint(y * inverse[i]), z = code * scale[i];
          error[i] += (y - z) * (y - z);
          length[i] += z * z;
          word[i] |= (static_cast<uint32_t>(static_cast<int32_t>(code) + 128) & 0xff) << 8 * j;
        }
      std::memcpy(words + 4 * d, word, sizeof(word));
    }
    for (int i = 0; i < 16; i++) {
      // In this order a NaN stays.
      worst.error = error[i] <= worst.error ? worst.error : error[i];
      worst.length = length[i] <= worst.length ? worst.length : length[i];
    }
  }
};

template <class T>
int32_t update_side_data(const ToptSideDataArgs& a) {
  const Writer<T> writer{a};
  for (int64_t i = 0; i < a.num_tokens; i++)
    if (a.slot_mapping[i] >= a.num_blocks * a.block_size) return kBlockOutOfRange;
  int32_t status = kOk;
  const int64_t per_token = int64_t{a.num_kv_heads} * a.head_dim * (a.sketch ? 8 : 1);
#pragma omp parallel for schedule(static) if (a.num_tokens * per_token > 64 * 1024)
  for (int64_t i = 0; i < a.num_tokens; i++) {
    const int64_t slot = a.slot_mapping[i];
    if (slot < 0 || (slot + 1) % a.group_size != 0) continue;
    const int group = static_cast<int>(slot % a.block_size) / a.group_size;
    for (int h = 0; h < a.num_kv_heads; h++) {
      T* page = static_cast<T*>(a.kv_cache) + slot / a.block_size * a.block_stride + h * a.head_stride;
      writer.mean_of_values(page, group);
      if (a.sketch && !writer.sketch_keys(page, group)) __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
    }
  }
  return status;
}

}  // namespace
}  // namespace topt

int32_t topt_update_side_data_avx2(const ToptSideDataArgs& args) {
  switch (args.dtype) {
    case kBFloat16:
      return args.amx ? topt::update_side_data<topt::tiled_bf16>(args) : topt::update_side_data<topt::bf16>(args);
    case kFloat16: return topt::update_side_data<topt::fp16>(args);
    case kFloat32: return topt::update_side_data<float>(args);
  }
  return kUnsupportedDtype;
}
