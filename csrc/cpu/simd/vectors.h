/* The vectors that every instruction set has, in the compiler's own vector types (GCC, Clang). An instruction
 * set's header includes this one after kLanes, and defines what is declared here. */
#ifndef ATTN_SAMPLER_CPU_SIMD_VECTORS_H_
#define ATTN_SAMPLER_CPU_SIMD_VECTORS_H_

#include <cstdint>
#include <cstring>

#include "attn_sampler.h"

namespace attn_sampler {
namespace {

template <typename T, int kCount>
struct VecOf {
    typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T, int kCount = kLanes>
using Vec = typename VecOf<T, kCount>::type;

using VecF = Vec<float>;
using VecI = Vec<int32_t>;
using VecU = Vec<uint32_t>;
using VecL = Vec<uint64_t, kLanes / 2>;
using VecH = Vec<uint16_t>;
using VecB = Vec<uint8_t>;

constexpr float kInf = __builtin_inff();

/* Two factors of a power of two. */
struct Exp2Factors {
    VecF near_one, power;
};

/* Rows that a product walks. */
struct Rows {
    const char *data;
    int64_t stride; /* bytes */
    int64_t count;
    const char *next; /* the first of the rows that will be wanted after these, or anything, to be fetched */

    const char *row(int64_t r) const { return r < count ? data + r * stride : next + (r - count) * stride; }
};

/* a * b + c, rounded once where the processor can; and with an exact product everywhere. */
VecF multiply_add(VecF a, VecF b, VecF c);
VecF exact_multiply_add(VecF a, VecF b, VecF c);

/* a > b ? a : b, which is b where either is NaN, and a < b ? a : b. GCC does not make these of that. */
VecF larger(VecF a, VecF b);
VecF smaller(VecF a, VecF b);

/* Whether a >= b in any lane. */
bool any_at_least(VecF a, VecF b);

/* Of 2^(x unit), where that exponent is in [-126, 127.5]; one is NaN where x is. The relative error is below
 * 2.5e-7, and where the unit is not 1, 1e-8 |x unit| more, or 6e-8 |x unit| without multiply-adds. */
Exp2Factors exp2_factors(VecF x, float unit);

/* sum + 2^(x unit) where that exponent is at most 128; adds nothing where it is below -126. Never into the
 * slow denormals. */
VecF add_exp2(VecF sum, VecF x, float unit);

/* 2^(x unit), the unit being positive; 0 where that exponent is below -126.5, inf from 127.5 or 128 on; NaN
 * stays NaN. Never into the slow denormals. */
VecF exp2_vec(VecF x, float unit);

/* The 64-bit products of the low halves. */
VecL multiply_low_halves(VecL a, VecL b);

/* Pairs of a's and b's 64-bit lanes: of the even lanes in low, of the odd ones in high. */
void interleave(VecL a, VecL b, VecL &low, VecL &high);

VecF bf16_to_float(VecH h);
VecF fp16_to_float(VecH h);

/* Lane i is the sum of the lanes of x[i]; uses up x[kLanes]. */
VecF sums_of_lanes(VecF *x);

/* packed[words][width] from rows of so many words, kLanes of them at the most and zeros beyond: as many words
 * as are transposed at once; returns how many. */
int64_t pack_squares(const Rows &rows, int64_t words, float *packed, int width);

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

/* Within [low, high]; NaN stays NaN. */
inline VecF clamp_lanes(VecF x, float low, float high) { return smaller(splat(high), larger(splat(low), x)); }

/* x * unit + y in one rounding where the processor can; a plain sum where the unit is known to be 1. */
inline VecF add_units(VecF x, float unit, VecF y) {
    return __builtin_constant_p(unit) && unit == 1.0f ? x + y : multiply_add(x, splat(unit), y);
}

/* All lanes as one: the upper half combined with the lower one, and so on. GCC makes scalar code of loops
 * over lanes. */
template <typename T, int kCount, typename Combine>
inline T combine_lanes(Vec<T, kCount> v, Combine combine) {
    if constexpr (kCount == 4) {
        return combine(combine(v[0], v[2]), combine(v[1], v[3]));
    } else {
        Vec<T, kCount / 2> low, high;
        memcpy(&low, &v, sizeof(low));
        memcpy(&high, reinterpret_cast<const char *>(&v) + sizeof(low), sizeof(high));
        return combine_lanes<T, kCount / 2>(combine(low, high), combine);
    }
}

inline float sum_of_lanes(VecF v) {
    return combine_lanes<float, kLanes>(v, [](auto a, auto b) { return a + b; });
}

inline double sum_of_lanes_in_double(VecF v) {
    return combine_lanes<double, kLanes>(__builtin_convertvector(v, Vec<double>),
                                         [](auto a, auto b) { return a + b; });
}

/* No lane being NaN. */
inline float largest_lane(VecF v) {
    return combine_lanes<float, kLanes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

/* e4m3 as bfloat16, which can hold every one of them. */
inline VecH fp8_to_bf16(VecB b) {
    using VecS = Vec<int16_t>;
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
template <typename V, typename From, typename To, typename Convert>
inline void convert_all(const From *x, int64_t n, To *out, Convert convert) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        store(out + i, convert(load<V>(x + i)));
    if (i < n) {
        From rest[kLanes] = {};
        To converted[kLanes];
        memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(From));
        store(converted, convert(load<V>(rest)));
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

/* Operands of a product as 32-bit words: any dtype, widened to float32. */
struct FloatWords {
    static constexpr int kElements = 1;     /* of a word */
    static constexpr int64_t kTogether = 1; /* rows that a unit takes at once */
    static VecF multiply_add(VecF sum, VecF column, VecF x) { return sum + x * column; }

    /* The first rows of c[rows][width] = a[rows][words] b[words][width], where a unit takes several at once;
     * returns how many. */
    static int64_t multiply_rows(const Rows &, const float *, int, int64_t, float *) { return 0; }
};

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_VECTORS_H_ */
