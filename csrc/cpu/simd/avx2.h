/* Vectors of eight lanes: AVX2 with FMA and F16C. */
#ifndef ATTN_SAMPLER_CPU_SIMD_AVX2_H_
#define ATTN_SAMPLER_CPU_SIMD_AVX2_H_

#include <immintrin.h>

namespace attn_sampler {
constexpr int kLanes = 8;
}

#include "cpu/simd/short_vectors.h"

namespace attn_sampler {
namespace {

inline VecF multiply_add(VecF a, VecF b, VecF c) {
    return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline VecF exact_multiply_add(VecF a, VecF b, VecF c) { return multiply_add(a, b, c); }

inline VecF larger(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VecF smaller(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }

inline bool any_at_least(VecF a, VecF b) { return _mm256_movemask_ps((__m256)(a >= b)) != 0; }

inline VecL multiply_low_halves(VecL a, VecL b) { return (VecL)_mm256_mul_epu32((__m256i)a, (__m256i)b); }

inline void interleave(VecL a, VecL b, VecL &low, VecL &high) {
    low = (VecL)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    high = (VecL)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
}

inline VecF fp16_to_float(VecH h) { return (VecF)_mm256_cvtph_ps((__m128i)h); }

} // namespace

namespace avx2 {
using PairWords = FloatWords;
}
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_AVX2_H_ */
