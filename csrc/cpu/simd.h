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

/* 2^x with relative error below 2e-7; 0 below 2^-126.5, inf above 2^127.5; NaN stays NaN. */
inline VecF exp2_vec(VecF x) {
    x = x < -127.0f ? splat(-127.0f) : x; /* never into the slow denormals */
    x = x > 128.0f ? splat(128.0f) : x;
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
    const VecF shifted = x + 0x1.8p23f;
    const VecF f = x - (shifted - 0x1.8p23f); /* in [-1/2, 1/2] */
    /* Minimax fit of 2^f. */
    VecF p = splat(0x1.5bba14p-10f);
    p = p * f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
    const VecU power = ((VecU)shifted + (127u - 0x4B400000u)) << 23;
    return p * (VecF)power;
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

inline VecF bf16_to_float(VecH h) { return (VecF)(__builtin_convertvector(h, VecU) << 16); }

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

inline float horizontal_sum(VecF v) {
    float lane[kLanes];
    store(lane, v);
    for (int n = kLanes / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i)
            lane[i] += lane[i + n];
    return lane[0];
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_H_ */
