/* Vectors of sixteen lanes: AVX-512 F, BW, VL and DQ. GCC 12 warns of a variable of its own in many of the
 * intrinsics that have no mask. */
#ifndef ATTN_SAMPLER_CPU_SIMD_AVX512_H_
#define ATTN_SAMPLER_CPU_SIMD_AVX512_H_

#include <immintrin.h>

namespace attn_sampler {
constexpr int kLanes = 16;
}

#include "cpu/simd/vectors.h"

namespace attn_sampler {
namespace {

inline VecF multiply_add(VecF a, VecF b, VecF c) {
    return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline VecF exact_multiply_add(VecF a, VecF b, VecF c) { return multiply_add(a, b, c); }

inline VecF larger(VecF a, VecF b) { return (VecF)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b); }
inline VecF smaller(VecF a, VecF b) { return (VecF)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b); }

inline bool any_at_least(VecF a, VecF b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ) != 0; }

/* 2^(j/32) as the bits of a float, less j at the place to which exp2_factors shifts it. */
struct Exp2Table {
    int32_t bits[32] = {};

    constexpr Exp2Table() {
        double power = 1.0;
        for (int j = 0; j < 32; ++j, power *= 0x1.059b0d3158574p+0)
            bits[j] = 0x3F800000 + static_cast<int32_t>((power - 1.0) * 0x1p23 + 0.5) - j * (1 << 18);
    }
};
alignas(64) constexpr Exp2Table kExp2Table;

inline Exp2Factors exp2_factors(VecF x, float unit) {
    /* 2^(n + j/32 + f). Adding 1.5 * 2^18 rounds to a multiple of 1/32 and leaves j in the lowest bits and n
     * above them. */
    const VecF rounded = add_units(x, unit, splat(0x1.8p18f));
    const VecF f = add_units(x, unit, 0x1.8p18f - rounded);
    /* Minimax fit on [-1/64, 1/64]. */
    VecF p = multiply_add(splat(0x1.ebfbdep-3f), f, splat(0x1.62e584p-1f));
    p = multiply_add(p, f, splat(1.0f));
    const VecU power = (VecU)_mm512_permutex2var_epi32(_mm512_load_si512(kExp2Table.bits), (__m512i)rounded,
                                                       _mm512_load_si512(kExp2Table.bits + 16));
    return {p, (VecF)(power + ((VecU)rounded << 18))};
}

/* Lanes whose power of two is neither 0 nor denormal. */
inline __mmask16 is_normal_exp2(VecF x, float unit) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f / unit), _CMP_NLT_UQ);
}

inline VecF add_exp2(VecF sum, VecF x, float unit) {
    const Exp2Factors e = exp2_factors(x, unit);
    return (VecF)_mm512_mask3_fmadd_ps((__m512)e.near_one, (__m512)e.power, (__m512)sum,
                                       is_normal_exp2(x, unit));
}

inline VecF exp2_vec(VecF x, float unit) {
    const Exp2Factors e = exp2_factors(smaller(splat(128.0f / unit), x), unit);
    return (VecF)_mm512_maskz_mul_ps(is_normal_exp2(x, unit), (__m512)e.near_one, (__m512)e.power);
}

inline VecL multiply_low_halves(VecL a, VecL b) {
    return (VecL)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
}

inline void interleave(VecL a, VecL b, VecL &low, VecL &high) {
    low = (VecL)_mm512_maskz_unpacklo_epi64(0xFF, (__m512i)a, (__m512i)b);
    high = (VecL)_mm512_maskz_unpackhi_epi64(0xFF, (__m512i)a, (__m512i)b);
}

inline VecF bf16_to_float(VecH h) {
    return (VecF)((VecU)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)h) << 16);
}
inline VecF fp16_to_float(VecH h) { return (VecF)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)h); }

/* Lanes of two vectors (0 to 15 and 16 to 31) for each stage of a transposition. */
struct Shuffles {
    int32_t low[4][16] = {}, high[4][16] = {};

    constexpr Shuffles() {
        for (int stage = 0; stage < 4; ++stage)
            for (int l = 0, step = 1 << stage; l < 16; ++l) {
                low[stage][l] = (l & step) == 0 ? l : 16 + l - step;
                high[stage][l] = (l & step) == 0 ? l + step : 16 + l;
            }
    }
};
alignas(64) constexpr Shuffles kShuffles;

/* x[i][j] = x[j][i]: pairs of lanes change places, then pairs of pairs, and so on. */
inline void transpose(VecF *x) {
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage) {
        const __m512i low = (__m512i)load<VecI>(kShuffles.low[stage]);
        const __m512i high = (__m512i)load<VecI>(kShuffles.high[stage]);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if ((i >> stage & 1) != 0)
                continue;
            const __m512 a = (__m512)x[i], b = (__m512)x[i + (1 << stage)];
            x[i] = (VecF)_mm512_permutex2var_ps(a, low, b);
            x[i + (1 << stage)] = (VecF)_mm512_permutex2var_ps(a, high, b);
        }
    }
}

/* As for a transposition, except that both results of an exchange are added. */
inline VecF sums_of_lanes(VecF *x) {
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage) {
        const __m512i low = (__m512i)load<VecI>(kShuffles.low[stage]);
        const __m512i high = (__m512i)load<VecI>(kShuffles.high[stage]);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 2 << stage) {
            const __m512 a = (__m512)x[i], b = (__m512)x[i + (1 << stage)];
            x[i] = (VecF)_mm512_permutex2var_ps(a, low, b) + (VecF)_mm512_permutex2var_ps(a, high, b);
        }
    }
    return x[0];
}

inline int64_t pack_squares(const Rows &rows, int64_t words, float *packed, int width) {
    int64_t d = 0;
    for (; d + 16 <= words; d += 16) {
        VecF x[16] = {};
        if (rows.count == 16) {
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i)
                x[i] = load<VecF>(rows.data + i * rows.stride + d * 4);
        } else {
            for (int i = 0; i < rows.count; ++i)
                x[i] = load<VecF>(rows.data + i * rows.stride + d * 4);
        }
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            store(packed + (d + i) * width, x[i]);
    }
    return d;
}

} // namespace

namespace avx512 {
using PairWords = FloatWords;
}
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_AVX512_H_ */
