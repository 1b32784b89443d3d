/* The sampling stream, fixed to the last bit on every backend.
 *
 * Philox4x32-10 (Salmon et al., SC 2011) with the row's seed as key and (token / 4, position, 0, 0) as
 * counter gives one 32-bit word for each token; gumbel() turns it into standard Gumbel noise using
 * nothing but float32 additions, subtractions and multiplications, each rounded once. No library
 * logarithm takes part, and no multiply-add may be fused: compile with -ffp-contract=off (nvcc: -fmad=false
 * or the _rn intrinsics). The PyTorch twin is attn_sampler/reference.py.
 */
#ifndef ATTN_SAMPLER_RANDOM_H_
#define ATTN_SAMPLER_RANDOM_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ATTN_SAMPLER_HD __host__ __device__
#else
#define ATTN_SAMPLER_HD
#endif

namespace attn_sampler {

struct PhiloxWords {
    uint32_t word[4];
};

/* The four words of the tokens 4 * group .. 4 * group + 3 at one position. */
ATTN_SAMPLER_HD static inline PhiloxWords philox(uint64_t seed, uint32_t group, uint32_t position) {
    uint32_t c0 = group, c1 = position, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
        const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c0 = n0;
        c1 = static_cast<uint32_t>(p1);
        c2 = n2;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

/* -log(x) for a normal positive float; within 2 ulp, the same bits everywhere. */
ATTN_SAMPLER_HD static inline float exact_neg_log(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const int32_t exponent = (bits - 0x3f3504f3) >> 23; /* x = 2^exponent * m, m in [sqrt(1/2), sqrt(2)) */
    bits -= exponent * (1 << 23);
    float m;
    memcpy(&m, &bits, sizeof(m));
    const float f = m - 1.0f;
    const float e = static_cast<float>(exponent);
    const float z = f * f;
    /* log(1 + f) = f - f^2 / 2 + f^3 p(f); p is a weighted least-squares fit, relative error 6e-9. */
    float p = -0x1.38b81ap-4f;
    p = p * f + 0x1.055bdcp-3f;
    p = p * f + -0x1.0d84eep-3f;
    p = p * f + 0x1.22da06p-3f;
    p = p * f + -0x1.54724cp-3f;
    p = p * f + 0x1.99a00ap-3f;
    p = p * f + -0x1.000226p-2f;
    p = p * f + 0x1.555554p-2f;
    float y = (f * z) * p;
    y = y + e * -0x1.bd0106p-13f; /* log(2) = 0x1.63p-1 + -0x1.bd0106p-13, the first short enough for e */
    y = y - 0.5f * z;
    return -((f + y) + e * 0x1.63p-1f);
}

/* Standard Gumbel noise from a random word: -log(-log(1 - w)), w uniform on (0, 1). */
ATTN_SAMPLER_HD static inline float gumbel(uint32_t word) {
    float w = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
    w = w < 0x1.fffffep-1f ? w : 0x1.fffffep-1f;
    const float u = 1.0f - w;
    const float exponential =
        (w - (1.0f - u)) + exact_neg_log(u); /* what rounding took off 1 - w, put back */
    return exact_neg_log(exponential);
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_RANDOM_H_ */
