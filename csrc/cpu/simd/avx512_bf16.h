/* AVX-512 with products of bfloat16. */
#ifndef ATTN_SAMPLER_CPU_SIMD_AVX512_BF16_H_
#define ATTN_SAMPLER_CPU_SIMD_AVX512_BF16_H_

#include "cpu/simd/avx512.h"

namespace attn_sampler {
namespace {

/* bfloat16 in pairs; products are exact, sums float32. */
struct Bf16Words : FloatWords {
    static constexpr int kElements = 2;
    static VecF multiply_add(VecF sum, VecF column, VecF x) {
        return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)column, (__m512bh)x);
    }
};

} // namespace

namespace avx512_bf16 {
using PairWords = Bf16Words;
}
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_AVX512_BF16_H_ */
