// The 8-bit copy of K beside it, which pruned rows scan in its place: per token a scale and one byte a dimension, of K
// minus its group's mean, rotated by a Hadamard matrix so that no dimension stands out.
//
// In a page, behind the V means: codes [block_size / 16][head_dim / 4][16 tokens][4] as unsigned bytes, 128 being zero;
// scales [block_size] bf16; centres [groups][head_dim] in the cache dtype; and per group the largest error of a key and
// the largest norm of what the codes stand for. Valid, as the means are, for complete groups.
//
// A score is an exact sum of integers, then one multiply-add, so that every instruction set gives the same.
#pragma once

#include <cmath>

#include "arena.h"
#include "tiles_avx512.h"

namespace topt {

// A group whose scores may be off by more than this, as a standard deviation in units of logits, is scored with K.
constexpr float kSketchError = 0.2f;

// Bounds of a group: norms over head_dim.
struct SketchBound {
  float error, length;
};

// Where the parts of a page's sketch are.
template <class T>
struct SketchPage {
  uint8_t* codes;
  uint16_t* scales;
  T* centres;
  SketchBound* bounds;

  SketchPage(const T* page, int D, int B, int groups) {
    T* behind_means = const_cast<T*>(page) + static_cast<size_t>(2 * B + groups) * D;
    codes = reinterpret_cast<uint8_t*>(behind_means);
    scales = reinterpret_cast<uint16_t*>(codes + static_cast<size_t>(B) * D);
    centres = reinterpret_cast<T*>(scales + B);
    bounds = reinterpret_cast<SketchBound*>(centres + static_cast<size_t>(groups) * D);
  }
};

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Rotates columns of x[head_dim][N], in blocks of the largest power of two that divides head_dim.
template <int N>
TOPT_INLINE void rotate(float* x, int head_dim) {
  const int size = head_dim & -head_dim;
  for (int h = 1; h < size; h *= 2)
    for (int i = 0; i < head_dim; i += 2 * h) {
      float *__restrict a = x + static_cast<size_t>(i) * N, *__restrict b = a + static_cast<size_t>(h) * N;
      for (int t = 0; t < h * N; t++) {
        const float u = a[t], v = b[t];
        a[t] = u + v;
        b[t] = u - v;
      }
    }
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (size_t i = 0; i < static_cast<size_t>(head_dim) * N; i++) x[i] *= scale;
}

// A tile of query heads, as the codes are multiplied with it: bytes, also widened to 16 bits.
struct SketchTile {
  const int32_t* bytes;  // [head_dim / 4][GT], four each
  const int16_t* words;  // [head_dim / 4][GT][4]
  const int32_t* zero;   // [GT] what codes of zero add up to
  const float* scale;    // [GT]
};

#ifndef TOPT_EMULATE_AVX512
inline bool has_vnni() {
  static const bool has = topt_vnni_supported() != 0;
  return has;
}

// As an intrinsic GCC 12 copies every accumulator and spills.
TOPT_AVX512 TOPT_INLINE void add_dots(__m512i& acc, __m512i codes, __m512i q) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
}

// Scores of one group of tokens, in address order. offset: [GT][offset_stride]; s: [GT][s_stride].
template <int GT, int SIZE>
TOPT_TILE TOPT_AVX512 void sketch_group_vnni(const uint8_t* codes, const uint16_t* scales, const SketchTile& q,
                                             int head_dim, const float* offset, int offset_stride, float* s,
                                             int s_stride, LineStream ahead) {
  constexpr int N = GT <= 7 ? 4 : 2;  // sums of a head, which are independent
  // The last quarter of a page is for the exponentials to prefetch.
  constexpr int kLines = N == 4 ? 3 : N;
  for (int t = 0; t < SIZE; t += 16) {
    __m512i sum[GT][N];
    TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < N; i++) sum[g][i] = _mm512_setzero_si512();
    const int32_t* bytes = q.bytes;
    for (int d = 0; d < head_dim; d += 4 * N) {
      ahead.fetch(kLines);
      TOPT_UNROLL for (int i = 0; i < N; i++) {
        const __m512i x = _mm512_loadu_si512(codes);
        TOPT_UNROLL for (int g = 0; g < GT; g++) add_dots(sum[g][i], x, _mm512_set1_epi32(bytes[g]));
        codes += 64;
        bytes += GT;
      }
    }
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + t));
    const __m512 of_token = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    TOPT_UNROLL for (int g = 0; g < GT; g++) {
      TOPT_UNROLL for (int i = 1; i < N; i++) sum[g][0] = _mm512_add_epi32(sum[g][0], sum[g][i]);
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[g][0], _mm512_set1_epi32(q.zero[g])));
      const __m512 scale = _mm512_mul_ps(of_token, _mm512_set1_ps(q.scale[g]));
      const __m512 score = _mm512_fmadd_ps(dot, scale, _mm512_set1_ps(offset[g * offset_stride]));
      _mm512_store_ps(s + g * s_stride + t, score);
    }
  }
}
#endif

// The same for 4 * NV tokens with AVX2: products of pairs of 16-bit numbers.
template <int GT, int NV>
TOPT_INLINE void sketch_tile(const uint8_t* __restrict codes, const uint16_t* __restrict scales, const SketchTile& q,
                             int head_dim, const float* offset, int offset_stride, float* __restrict s, int s_stride,
                             LineStream& ahead) {
  __m256i acc[GT][NV];
  TOPT_UNROLL for (int g = 0; g < GT; g++) TOPT_UNROLL for (int i = 0; i < NV; i++)
      acc[g][i] = _mm256_setzero_si256();
  const int16_t* words = q.words;
  for (int d = 0; d < head_dim; d += 4) {
    if (NV == 4 || d % 8 == 0) ahead.fetch(1);
    __m256i x[NV];
    TOPT_UNROLL for (int i = 0; i < NV; i++)
        x[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
    TOPT_UNROLL for (int g = 0; g < GT; g++) {
      int64_t four;
      std::memcpy(&four, words + 4 * g, 8);
      const __m256i of_head = _mm256_set1_epi64x(four);
      TOPT_UNROLL for (int i = 0; i < NV; i++)
          acc[g][i] = _mm256_add_epi32(acc[g][i], _mm256_madd_epi16(x[i], of_head));
    }
    codes += 64;
    words += 4 * GT;
  }
  TOPT_UNROLL for (int i = 0; i < NV; i += 2) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 4 * i));
    const __m256 of_token = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    TOPT_UNROLL for (int g = 0; g < GT; g++) {
      const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[g][i], acc[g][i + 1]), 0xd8);
      const __m256 dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(q.zero[g])));
      const __m256 scale = _mm256_mul_ps(of_token, _mm256_set1_ps(q.scale[g]));
      const __m256 score = _mm256_fmadd_ps(dot, scale, _mm256_set1_ps(offset[g * offset_stride]));
      _mm256_store_ps(s + g * s_stride + 4 * i, score);
    }
  }
}

template <int GT, int SIZE>
TOPT_TILE void sketch_group(const uint8_t* codes, const uint16_t* scales, const SketchTile& q, int head_dim,
                            const float* offset, int offset_stride, float* s, int s_stride, LineStream ahead) {
  constexpr int NV = GT <= 2 ? 4 : 2;
  for (int t = 0; t < SIZE; t += 4 * NV)
    sketch_tile<GT, NV>(codes + static_cast<size_t>(t / 16 * 16) * head_dim + t % 16 * 4, scales + t, q, head_dim,
                        offset, offset_stride, s + t, s_stride, ahead);
}

// The query heads of a row against sketches.
class SketchQuery {
 public:
  static size_t bytes(int G, int D) {
    const size_t n = static_cast<size_t>(G) * D;
    return Arena::bytes_for<float>(n) + Arena::bytes_for<int16_t>(n) + Arena::bytes_for<int8_t>(n) +
           2 * Arena::bytes_for<float>(D) + 4 * Arena::bytes_for<float>(G);
  }

  SketchQuery(Arena& arena, int G, int D)
      : D(D),
        natural(arena.take<float>(static_cast<size_t>(G) * D)),
        rotated(arena.take<float>(D)),
        wide(arena.take<float>(D)),
        words(arena.take<int16_t>(static_cast<size_t>(G) * D)),
        bytes_(arena.take<int8_t>(static_cast<size_t>(G) * D)),
        zero(arena.take<int32_t>(G)),
        scale(arena.take<float>(G)),
        norm(arena.take<float>(G)),
        error(arena.take<float>(G)) {}

  // Head g, number h of a tile of `heads` that begins at head g - h. q: [D] in the units of scores; to_logits turns
  // those into logits.
  void set(int g, int h, int heads, const float* q, float to_logits) {
    float* mine = natural + static_cast<size_t>(g) * D;
    float largest = 0, squares = 0;
    for (int d = 0; d < D; d++) {
      mine[d] = rotated[d] = q[d];
      squares += q[d] * q[d];
    }
    rotate<1>(rotated, D);
    for (int d = 0; d < D; d++) largest = std::max(largest, std::fabs(rotated[d]));
    const float step = std::max(largest / 127.0f, 1e-30f);
    const size_t tile = static_cast<size_t>(g - h) * D;
    int32_t sum = 0;
    for (int d = 0; d < D; d += 4)
      for (int i = 0; i < 4; i++) {
        const int32_t code = static_cast<int32_t>(std::nearbyint(rotated[d + i] / step));
        const size_t at = tile + static_cast<size_t>(d) * heads + h * 4 + i;
        sum += code;
        words[at] = static_cast<int16_t>(code);
        bytes_[at] = static_cast<int8_t>(code);
      }
    scale[g] = step;
    zero[g] = 128 * sum;
    norm[g] = std::sqrt(squares) * to_logits;
    error[g] = 0.5f * step * std::sqrt(static_cast<float>(D)) * to_logits;
  }

  SketchTile tile(int g) const {
    const size_t at = static_cast<size_t>(g) * D;
    return {reinterpret_cast<const int32_t*>(bytes_ + at), words + at, zero + g, scale + g};
  }

  // Whether the scores of a group are as good as K's.
  bool trusts(const SketchBound& bound, int G) const {
    float worst = 0;
    for (int g = 0; g < G; g++) worst = std::max(worst, norm[g] * bound.error + error[g] * bound.length);
    return worst <= kSketchError * std::sqrt(static_cast<float>(D));
  }

  // q.centre of all heads, `stride` apart: the same steps whatever the instruction set.
  template <class T>
  void meet(const T* centre, int G, float* offset, int stride) const {
    for (int d = 0; d < D; d += 16) {
      __m256 a, b;
      load16_natural(centre + d, a, b);
      _mm256_store_ps(wide + d, a);
      _mm256_store_ps(wide + d + 8, b);
    }
    for (int g = 0; g < G; g++) {
      const float* q = natural + static_cast<size_t>(g) * D;
      __m256 sum = _mm256_setzero_ps(), more = sum;
      for (int d = 0; d < D; d += 16) {
        sum = _mm256_fmadd_ps(_mm256_load_ps(wide + d), _mm256_load_ps(q + d), sum);
        more = _mm256_fmadd_ps(_mm256_load_ps(wide + d + 8), _mm256_load_ps(q + d + 8), more);
      }
      offset[g * stride] = horizontal_sum(_mm256_add_ps(sum, more));
    }
  }

 private:
  const int D;
  float* natural;          // [G][D]
  float *rotated, *wide;   // [D] a head, and a centre
  int16_t* words;
  int8_t* bytes_;
  int32_t* zero;
  float *scale, *norm, *error;  // [G]; the last two in logits per unit of a bound
};

}  // namespace topt
