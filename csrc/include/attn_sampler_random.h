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

/* The arithmetic is written once, for one lane or for a vector of them. Float, Int and Word are 32 bits wide;
 * Wide holds the product of two words. */
struct ScalarLane {
    using Float = float;
    using Int = int32_t;
    using Word = uint32_t;
    using Wide = uint64_t;
    template <typename T>
    ATTN_SAMPLER_HD static Float to_float(T x) {
        return static_cast<Float>(x);
    }
    /* Rounded towards 0. */
    ATTN_SAMPLER_HD static Int to_int(Float x) { return static_cast<Int>(x); }
    /* The product of the low halves. */
    ATTN_SAMPLER_HD static Wide multiply(Wide a, uint32_t b) {
        return static_cast<Wide>(static_cast<uint32_t>(a)) * b;
    }
};

template <typename Wide>
struct PhiloxWords {
    Wide word[4];
};

/* The four words, in the low halves, of the tokens 4 * group .. 4 * group + 3 at one position. */
template <typename Lane = ScalarLane>
ATTN_SAMPLER_HD inline PhiloxWords<typename Lane::Wide> philox(uint64_t seed, typename Lane::Wide group,
                                                               uint32_t position) {
    using Wide = typename Lane::Wide;
    Wide c0 = group, c1 = Wide{} + position, c2{}, c3{};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) { /* the high halves carry rubbish along, which nothing reads */
        const Wide p0 = Lane::multiply(c0, 0xD2511F53u), p1 = Lane::multiply(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ k0;
        c1 = p1;
        c2 = (p0 >> 32) ^ c3 ^ k1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const uint32_t low = 0xFFFFFFFFu;
    return {{c0 & low, c1 & low, c2 & low, c3 & low}};
}

/* -log(x) for a normal positive float; within 2 ulp, the same bits everywhere. */
template <typename Lane = ScalarLane>
ATTN_SAMPLER_HD inline typename Lane::Float exact_neg_log(typename Lane::Float x) {
    using Float = typename Lane::Float;
    typename Lane::Int bits;
    memcpy(&bits, &x, sizeof(bits));
    /* x = 2^exponent * m, m in [sqrt(1/2), sqrt(2)) */
    const typename Lane::Int exponent = (bits - 0x3f3504f3) >> 23;
    bits -= exponent * (1 << 23);
    Float m;
    memcpy(&m, &bits, sizeof(m));
    const Float f = m - 1.0f;
    const Float e = Lane::to_float(exponent);
    const Float z = f * f;
    /* log(1 + f) = f - f^2 / 2 + f^3 p(f); p is a weighted least-squares fit, relative error 6e-9. */
    Float p = -0x1.38b81ap-4f * f + 0x1.055bdcp-3f;
    p = p * f + -0x1.0d84eep-3f;
    p = p * f + 0x1.22da06p-3f;
    p = p * f + -0x1.54724cp-3f;
    p = p * f + 0x1.99a00ap-3f;
    p = p * f + -0x1.000226p-2f;
    p = p * f + 0x1.555554p-2f;
    Float y = (f * z) * p;
    y = y + e * -0x1.bd0106p-13f; /* log(2) = 0x1.63p-1 + -0x1.bd0106p-13, the first short enough for e */
    y = y - 0.5f * z;
    return -((f + y) + e * 0x1.63p-1f);
}

/* exp(distance) in units of 2^-30, rounded down, of a distance <= 0: the weight of a token so far below the
 * largest. Of integers, so that sums depend on no order. */
template <typename Lane = ScalarLane>
ATTN_SAMPLER_HD inline typename Lane::Int token_weight(typename Lane::Float distance) {
    using Float = typename Lane::Float;
    Float t = distance * 0x1.715476p+0f;
    t = t > -64.0f ? t : Float{} + -64.0f;
    const typename Lane::Int whole = Lane::to_int(t), bits = (whole + (127 + 30)) << 23;
    const Float f = t - Lane::to_float(whole); /* in (-1, 0] */
    Float scale;
    memcpy(&scale, &bits, sizeof(scale));
    Float p = 0x1.eeabe2p-11f * f + 0x1.2d8974p-7f;
    p = p * f + 0x1.c4f802p-5f;
    p = p * f + 0x1.ebe2eap-3f;
    p = p * f + 0x1.62e3b6p-1f;
    p = p * f + 1.0f;
    return Lane::to_int(p * scale);
}

/* Standard Gumbel noise from a random word: -log(-log(1 - w)), w uniform on (0, 1). */
template <typename Lane = ScalarLane>
ATTN_SAMPLER_HD inline typename Lane::Float gumbel(typename Lane::Word word) {
    using Float = typename Lane::Float;
    Float w = Lane::to_float(word) * 0x1p-32f + 0x1p-33f;
    w = w < 0x1.fffffep-1f ? w : Float{} + 0x1.fffffep-1f;
    const Float u = 1.0f - w;
    /* The bracket is what rounding took off 1 - w, put back. */
    const Float exponential = (w - (1.0f - u)) + exact_neg_log<Lane>(u);
    return exact_neg_log<Lane>(exponential);
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_RANDOM_H_ */
