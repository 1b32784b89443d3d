/* Vectors of the instruction set that a file is compiled for, in the compiler's own vector types (GCC,
 * Clang).
 *
 * The files that include this are compiled once for each instruction set. Everything here has internal
 * linkage: a shared inline function would let the linker keep the copy with instructions that an older
 * processor lacks.
 */
#ifndef ATTN_SAMPLER_CPU_SIMD_H_
#define ATTN_SAMPLER_CPU_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "attn_sampler.h"

namespace attn_sampler {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint64_t VecL __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef uint8_t VecB __attribute__((vector_size(kLanes)));

constexpr float kInf = __builtin_inff();

inline VecF splat(float x) { return x - VecF{}; }
inline VecI splat(int32_t x) { return x - VecI{}; }

template <typename V, typename T>
inline V load(const T *p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}

template <typename V, typename T>
inline void store(T *p, V v) {
    memcpy(p, &v, sizeof(V));
}

/* A 32-bit word of any kind in all lanes. */
inline VecF broadcast_word(const void *p) {
    int32_t word;
    memcpy(&word, p, sizeof(word));
    return (VecF)splat(word);
}

inline VecI lane_index() {
    VecI v;
    for (int i = 0; i < kLanes; ++i)
        v[i] = i;
    return v;
}

/* a * b + c, rounded once where the processor can. */
inline VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
    return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* The same with an exact product everywhere. */
inline VecF exact_multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__) || defined(__FMA__)
    return multiply_add(a, b, c);
#else
    typedef double VecD __attribute__((vector_size(kLanes * 8)));
    const VecD product = __builtin_convertvector(a, VecD) * __builtin_convertvector(b, VecD);
    return __builtin_convertvector(product + __builtin_convertvector(c, VecD), VecF);
#endif
}

/* a > b ? a : b, which is b where either is NaN, and a < b ? a : b. GCC does not make these of that. */
inline VecF larger(VecF a, VecF b) {
#if defined(__AVX512F__)
    return (VecF)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline VecF smaller(VecF a, VecF b) {
#if defined(__AVX512F__)
    return (VecF)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

/* Within [low, high]; NaN stays NaN. */
inline VecF clamp(VecF x, float low, float high) { return smaller(splat(high), larger(splat(low), x)); }

/* Whether a >= b in any lane. */
inline bool any_at_least(VecF a, VecF b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)(a >= b)) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)(a >= b)) != 0;
#else
    const VecI mask = a >= b;
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i)
        any |= mask[i];
    return any != 0;
#endif
}

#if defined(__AVX512F__)
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
#endif

/* x * unit + y in one rounding where the processor can; a plain sum where the unit is known to be 1. */
inline VecF add_units(VecF x, float unit, VecF y) {
    return __builtin_constant_p(unit) && unit == 1.0f ? x + y : multiply_add(x, splat(unit), y);
}

/* Two factors of 2^(x unit), where that exponent is in [-126, 127.5]; one is NaN where x is. The relative
 * error is below 2.5e-7, and where the unit is not 1, 1e-8 |x unit| more, or 6e-8 |x unit| without
 * multiply-adds. */
struct Exp2Factors {
    VecF near_one, power;
};

inline Exp2Factors exp2_factors(VecF x, float unit) {
#if defined(__AVX512F__)
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
#else
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
    const VecF integer = add_units(x, unit, splat(0x1.8p23f));
    const VecF f = add_units(x, unit, 0x1.8p23f - integer);
    /* Minimax fit on [-1/2, 1/2]. */
    VecF p = splat(0x1.5bba14p-10f);
    p = multiply_add(p, f, splat(0x1.3cea88p-7f));
    p = multiply_add(p, f, splat(0x1.c6b752p-5f));
    p = multiply_add(p, f, splat(0x1.ebf9bcp-3f));
    p = multiply_add(p, f, splat(0x1.62e42ap-1f));
    p = multiply_add(p, f, splat(1.0f));
    const VecU power = ((VecU)integer + (127u - 0x4B400000u)) << 23;
    return {p, (VecF)power};
#endif
}

/* sum + 2^(x unit) where that exponent is at most 128; adds nothing where it is below -126. Never into the
 * slow denormals. */
inline VecF add_exp2(VecF sum, VecF x, float unit) {
#if defined(__AVX512F__)
    const Exp2Factors e = exp2_factors(x, unit);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f / unit), _CMP_NLT_UQ);
    return (VecF)_mm512_mask3_fmadd_ps((__m512)e.near_one, (__m512)e.power, (__m512)sum, normal);
#else
    const VecF least = splat(-127.0f / unit); /* whose power is 0 */
    const Exp2Factors e = exp2_factors(larger(least, x), unit);
    return multiply_add(e.near_one, e.power, sum);
#endif
}

/* 2^(x unit), the unit being positive; 0 where that exponent is below -126.5, inf from 127.5 or 128 on; NaN
 * stays NaN. Never into the slow denormals. */
inline VecF exp2_vec(VecF x, float unit) {
#if defined(__AVX512F__)
    const Exp2Factors e = exp2_factors(smaller(splat(128.0f / unit), x), unit);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f / unit), _CMP_NLT_UQ);
    return (VecF)_mm512_maskz_mul_ps(normal, (__m512)e.near_one, (__m512)e.power);
#else
    const Exp2Factors e = exp2_factors(clamp(x, -127.0f / unit, 128.0f / unit), unit);
    return e.near_one * e.power;
#endif
}

/* The 64-bit products of the low halves. */
inline VecL multiply_low_halves(VecL a, VecL b) {
#if defined(__AVX512F__)
    return (VecL)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (VecL)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (VecL)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

/* Pairs of a's and b's 64-bit lanes: of the even lanes in low, of the odd ones in high. */
inline void interleave(VecL a, VecL b, VecL &low, VecL &high) {
#if defined(__AVX512F__)
    low = (VecL)_mm512_maskz_unpacklo_epi64(0xFF, (__m512i)a, (__m512i)b);
    high = (VecL)_mm512_maskz_unpackhi_epi64(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    low = (VecL)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    high = (VecL)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
    low = VecL{a[0], b[0]};
    high = VecL{a[1], b[1]};
#endif
}

inline VecF bf16_to_float(VecH h) {
#if defined(__AVX512F__)
    return (VecF)((VecU)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)h) << 16);
#else
    return (VecF)(__builtin_convertvector(h, VecU) << 16);
#endif
}

inline VecF fp16_to_float(VecH h) {
#if defined(__AVX512F__)
    /* The form without a mask makes GCC 12 warn of its own uninitialised variable. */
    return (VecF)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)h);
#elif defined(__F16C__)
    return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
    const VecU u = __builtin_convertvector(h, VecU);
    const VecU sign = (u & 0x8000u) << 16;
    /* Exponent and fraction moved into place; the product rebases the exponent, subnormals included. */
    const VecF magnitude = (VecF)((u & 0x7FFFu) << 13) * 0x1p112f;
    const VecU special = (VecU)(magnitude >= 65536.0f) & 0x7F800000u;
    return (VecF)((VecU)magnitude | special | sign);
#endif
}

/* e4m3 as bfloat16, which can hold every one of them. */
inline VecH fp8_to_bf16(VecB b) {
    typedef int16_t VecS __attribute__((vector_size(kLanes * 2)));
    const VecH h = __builtin_convertvector(b, VecH);
    const VecS x = (VecS)(h & 0x7F);
    const VecS normal = (x << 4) + (120 << 7); /* exponent rebased */
    /* x * 2^-9, whose leading bit is that of 4, 2 or 1. */
    const VecS of_one = -(VecS)(x == 1) * (118 << 7);
    const VecS of_two = ((x - 2) << 6) + (119 << 7), of_four = ((x - 4) << 5) + (120 << 7);
    VecS value = x < 8 ? of_four : normal;
    value = x < 4 ? of_two : value;
    value = x < 2 ? of_one : value;
    return (VecH)value | ((VecH)(x == 0x7F) & 0x7FC0) | (h & 0x80) << 8;
}

inline VecF fp8_to_float(VecB b) { return bf16_to_float(fp8_to_bf16(b)); }

/* Stores convert(x[i .. i + kLanes)) to out + i for all of x[0 .. n). */
template <typename Vec, typename From, typename To, typename Convert>
inline void convert_all(const From *x, int64_t n, To *out, Convert convert) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        store(out + i, convert(load<Vec>(x + i)));
    if (i < n) {
        From rest[kLanes] = {};
        To converted[kLanes];
        memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(From));
        store(converted, convert(load<Vec>(rest)));
        memcpy(out + i, converted, static_cast<size_t>(n - i) * sizeof(To));
    }
}

/* e4m3 x[0 .. n) as bfloat16. */
inline void convert_to_bf16(const void *x, int64_t n, uint16_t *out) {
    convert_all<VecB>(static_cast<const uint8_t *>(x), n, out, fp8_to_bf16);
}

/* x[0 .. n) as float32. */
inline void convert_to_float(const void *x, int dtype, int64_t n, float *out) {
    if (dtype == ATTN_SAMPLER_FLOAT32) {
        memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    if (dtype == ATTN_SAMPLER_FLOAT8_E4M3) {
        convert_all<VecB>(static_cast<const uint8_t *>(x), n, out, fp8_to_float);
        return;
    }
    const uint16_t *halves = static_cast<const uint16_t *>(x);
    if (dtype == ATTN_SAMPLER_FLOAT16)
        convert_all<VecH>(halves, n, out, fp16_to_float);
    else
        convert_all<VecH>(halves, n, out, bf16_to_float);
}

template <typename T, int kCount>
struct Vec {
    typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

/* All lanes as one: the upper half combined with the lower one, and so on. GCC makes scalar code of loops
 * over lanes. */
template <typename T, int kCount, typename Combine>
inline T combine_lanes(typename Vec<T, kCount>::type v, Combine combine) {
    if constexpr (kCount == 4) {
        return combine(combine(v[0], v[2]), combine(v[1], v[3]));
    } else {
        typename Vec<T, kCount / 2>::type low, high;
        memcpy(&low, &v, sizeof(low));
        memcpy(&high, reinterpret_cast<const char *>(&v) + sizeof(low), sizeof(high));
        return combine_lanes<T, kCount / 2>(combine(low, high), combine);
    }
}

inline float sum_of_lanes(VecF v) {
    return combine_lanes<float, kLanes>(v, [](auto a, auto b) { return a + b; });
}

inline double sum_of_lanes_in_double(VecF v) {
    return combine_lanes<double, kLanes>(__builtin_convertvector(v, typename Vec<double, kLanes>::type),
                                         [](auto a, auto b) { return a + b; });
}

/* No lane being NaN. */
inline float largest_lane(VecF v) {
    return combine_lanes<float, kLanes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

/* Rows that a product walks. */
struct Rows {
    const char *data;
    int64_t stride; /* bytes */
    int64_t count;
    const char *next; /* the first of the rows that will be wanted after these, or anything, to be fetched */

    const char *row(int64_t r) const { return r < count ? data + r * stride : next + (r - count) * stride; }
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_H_ */
