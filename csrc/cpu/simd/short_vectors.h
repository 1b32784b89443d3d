/* What vectors of four and eight lanes do alike, having neither permutes of two vectors nor masks. */
#ifndef ATTN_SAMPLER_CPU_SIMD_SHORT_VECTORS_H_
#define ATTN_SAMPLER_CPU_SIMD_SHORT_VECTORS_H_

#include "cpu/simd/vectors.h"

namespace attn_sampler {
namespace {

inline Exp2Factors exp2_factors(VecF x, float unit) {
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
}

inline VecF add_exp2(VecF sum, VecF x, float unit) {
    const VecF least = splat(-127.0f / unit); /* whose power is 0 */
    const Exp2Factors e = exp2_factors(larger(least, x), unit);
    return multiply_add(e.near_one, e.power, sum);
}

inline VecF exp2_vec(VecF x, float unit) {
    const Exp2Factors e = exp2_factors(clamp_lanes(x, -127.0f / unit, 128.0f / unit), unit);
    return e.near_one * e.power;
}

inline VecF bf16_to_float(VecH h) { return (VecF)(__builtin_convertvector(h, VecU) << 16); }

inline VecF sums_of_lanes(VecF *x) {
    VecF sums;
    for (int i = 0; i < kLanes; ++i)
        sums[i] = sum_of_lanes(x[i]);
    return sums;
}

inline int64_t pack_squares(const Rows &, int64_t, float *, int) { return 0; }

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SIMD_SHORT_VECTORS_H_ */
