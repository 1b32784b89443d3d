/* The softmax of tiles of rows over many keys, and the row log-sum-exp. */
#ifndef ATTN_SAMPLER_CPU_ROW_LSE_H_
#define ATTN_SAMPLER_CPU_ROW_LSE_H_

#include "cpu/tile.h"

namespace attn_sampler {
namespace ATTN_SAMPLER_ISA {

/* The base-2 log-sum-exp of every row that can count, into lse [B, Hq, M]; false where memory ran out. */
bool row_lse(const AttentionProblem &p, double *lse);

} // namespace ATTN_SAMPLER_ISA

namespace {

/* How many a kernel has to compute, because none are given. */
inline int64_t lse_count(const AttentionProblem &p) {
    return p.softmax_lse.data == nullptr ? p.batch * p.heads * p.n_rows : 0;
}

/* Computes as many into the front of a kernel's memory, for the plan to read; false where memory ran out. */
inline bool compute_lse(Plan &plan, void *memory) {
    if (lse_count(plan.p) == 0)
        return true;
    plan.lse = static_cast<double *>(memory);
    return ATTN_SAMPLER_ISA::row_lse(plan.p, static_cast<double *>(memory));
}

/* What to subtract from logits whose maximum this is: never inf - inf, and far above what is not +inf beside
 * it. */
inline VecF shift_of(VecF top) {
    const VecF finite = splat(__FLT_MAX__);
    return top > finite ? finite : top < -finite ? VecF{} : top;
}

/* How logits are kept: as products or, where the scale is negative, their opposites. No rounding, so that
 * weights of large logits agree with the log-sum-exp. Only a scale too small for that is multiplied in. */
struct LogitUnits {
    float factor; /* of a product, to be kept: 1, -1 or the scale */
    float unit;   /* of what is kept, in base-2 logits */

    explicit LogitUnits(float scale) : factor(scale), unit(1.0f) {
        if (std::fabs(scale) > 0x1p-100f) {
            factor = scale > 0.0f ? 1.0f : -1.0f;
            unit = std::fabs(scale);
        }
    }
};

/* The softmax of a tile of rows, which stand across the lanes, over keys that come block by block. */
template <typename Words>
struct Softmax {
    const Plan &plan;
    const LogitUnits kept;
    const bool keeps_products; /* the largest product is the largest logit */
    float top[kTile];          /* the largest logit of each row so far, in units */
    float sum[kTile];          /* of the exponentials relative to it */

    Softmax(const Plan &p, int64_t b, int64_t hkv)
        : plan(p), kept(p.scale(b, hkv)), keeps_products(!p.p.params.causal && kept.factor == 1.0f) {
        for (int i = 0; i < kTile; ++i) {
            top[i] = -kInf;
            sum[i] = 0.0f;
        }
    }

    /* Takes in the keys at these addresses and positions, up to kTile of them, before those at `next`, for
     * the packed rows at their positions. Leaves the exponentials, 0 where a row does not see a key, in
     * x[count][width]. */
    void add(const void *const *address, const int32_t *at, int64_t count, const void *next,
             const int32_t *position, const Scratch &s, int width, float *x) {
        float before[kTile];
        memcpy(before, top, sizeof(top));
        multiply_rows<Words>(plan, address, count, next, width, s, x, keeps_products ? top : nullptr);
        for (int j = 0; j < width; j += kLanes) {
            if (!keeps_products)
                scale_logits(at, count, load<VecI>(position + j), width, x + j, top + j);
            const VecF shift = shift_of(load<VecF>(top + j));
            const VecF earlier = load<VecF>(sum + j) * exp2_vec(load<VecF>(before + j) - shift, kept.unit);
            VecF total{}; /* of this block: long sums lose precision */
            for (int64_t i = 0; i < count; ++i) {
                const VecF e = exp2_vec(load<VecF>(x + i * width + j) - shift, kept.unit);
                store(x + i * width + j, e);
                total += e;
            }
            store(sum + j, earlier + total);
        }
    }

  private:
    void scale_logits(const int32_t *at, int64_t count, VecI position, int width, float *x,
                      float *largest) const {
        VecF m = load<VecF>(largest);
        for (int64_t i = 0; i < count; ++i) {
            VecF logit = load<VecF>(x + i * width) * kept.factor;
            if (plan.p.params.causal)
                logit = position >= at[i] ? logit : splat(-kInf);
            store(x + i * width, logit);
            m = larger(logit, m);
        }
        store(largest, m);
    }
};

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_ROW_LSE_H_ */
