// Mean V of every group of tokens that a cache write has completed.
#include "tiles_amx.h"

namespace topt {
namespace {

template <class T>
int32_t update_v_means(const ToptMeansArgs& a) {
  const int D = a.head_dim, B = a.block_size, size = a.group_size;
  for (int64_t i = 0; i < a.num_tokens; i++)
    if (a.slot_mapping[i] >= a.num_blocks * B) return kBlockOutOfRange;
#pragma omp parallel for schedule(static) if (a.num_tokens * a.num_kv_heads * D > 64 * 1024)
  for (int64_t i = 0; i < a.num_tokens; i++) {
    const int64_t slot = a.slot_mapping[i];
    if (slot < 0 || (slot + 1) % size != 0) continue;
    const int group = static_cast<int>(slot % B) / size;
    for (int h = 0; h < a.num_kv_heads; h++) {
      T* page = static_cast<T*>(a.kv_cache) + slot / B * a.block_stride + h * a.head_stride;
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
  }
  return kOk;
}

}  // namespace
}  // namespace topt

int32_t topt_update_v_means_avx2(const ToptMeansArgs& args) {
  switch (args.dtype) {
    case kBFloat16:
      return args.amx ? topt::update_v_means<topt::tiled_bf16>(args) : topt::update_v_means<topt::bf16>(args);
    case kFloat16: return topt::update_v_means<topt::fp16>(args);
    case kFloat32: return topt::update_v_means<float>(args);
  }
  return kUnsupportedDtype;
}
