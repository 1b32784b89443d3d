/* Vectors of four lanes on any processor; x86-64 ones have SSE2. */
#ifndef ATTN_SAMPLER_CPU_SIMD_PORTABLE_H_
#define ATTN_SAMPLER_CPU_SIMD_PORTABLE_H_

namespace attn_sampler {
constexpr int kLanes = 4;
}

#include "cpu/simd/short_vectors.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace attn_sampler {
namespace {

inline VecF multiply_add(VecF a, VecF b, VecF c) { return a * b + c; }

inline VecF exact_multiply_add(VecF a, VecF b, VecF c) {
    using VecD = Vec<double>;
    const VecD product = __builtin_convertvector(a, VecD) * __builtin_convertvector(b, VecD);
    return __builtin_convertvector(product + __builtin_convertvector(c, VecD), VecF);
}

inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }
inline VecF smaller(VecF a, VecF b) { return a < b ? a : b; }

#if defined(__SSE2__)
inline bool any_at_least(VecF a, VecF b) { return _mm_movemask_ps((__m128)(a >= b)) != 0; }
inline VecL multiply_low_halves(VecL a, VecL b) { return (VecL)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
inline bool any_at_least(VecF a, VecF b) {
    const VecI mask = a >= b;
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}
inline VecL multiply_low_halves(VecL a, VecL b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
#endif

inline void interleave(VecL a, VecL b, VecL &low, VecL &high) {
    low = VecL{a[0], b[0]};
    high = VecL{a[1], b[1]};
}

inline VecF fp16_to_float(VecH h) {
    const VecU u = __builtin_convertvector(h, VecU);
    const VecU sign = (u & 0x8000u) << 16;
    /* Exponent and fraction moved into place; the product rebases the exponent, subnormals included. */
    const VecF magnitude = (VecF)((u & 0x7FFFu) << 13) * 0x1p112f;
    const VecU special = (VecU)(magnitude >= 65536.0f) & 0x7F800000u;
    return (VecF)((VecU)magnitude | special | sign);
}

} // namespace

namespace portable {
using PairWords = FloatWords;
}
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_PORTABLE_H_ */
