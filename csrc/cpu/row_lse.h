/* The softmax of tiles of rows over many keys, and the row log-sum-exp. */
#ifndef ATTN_SAMPLER_CPU_ROW_LSE_H_
#define ATTN_SAMPLER_CPU_ROW_LSE_H_

#include "cpu/tile.h"

namespace attn_sampler {
namespace ATTN_SAMPLER_ISA {

/* That of every row that can count, into lse [B, Hq, M]; false where memory ran out. */
bool row_lse(const AttentionProblem &p, RowLse *lse);

} // namespace ATTN_SAMPLER_ISA

namespace {

/* How many a kernel has to compute, because none are given. */
inline int64_t lse_count(const AttentionProblem &p) {
    return p.softmax_lse.data == nullptr ? p.batch * p.heads * p.n_rows : 0;
}

/* Where the memory behind them starts. */
inline void *after_lse(const AttentionProblem &p, void *memory) {
    return static_cast<RowLse *>(memory) + lse_count(p);
}

/* Computes as many into the front of a kernel's memory, for the plan to read; false where memory ran out. */
inline bool compute_lse(Plan &plan, void *memory) {
    if (lse_count(plan.p) == 0)
        return true;
    plan.lse = static_cast<RowLse *>(memory);
    return ATTN_SAMPLER_ISA::row_lse(plan.p, static_cast<RowLse *>(memory));
}

/* What to subtract from logits whose maximum this is: never inf - inf, and far above what is not +inf beside
 * it. */
inline VecF shift_of(VecF top) {
    const VecF finite = splat(__FLT_MAX__);
    return top > finite ? finite : top < -finite ? VecF{} : top;
}

/* The softmax of up to kTile of a key head's rows, which stand across the lanes, over keys that come block by
 * block. Row f of the key head's list is row f % rows of query head f / rows of the group. */
template <typename Words>
struct Softmax {
    const Plan &plan;
    const int64_t b, hkv;
    const Scratch &s;
    const LogitUnits kept;
    const bool keeps_products; /* the largest product is the largest logit */
    int64_t n = 0;             /* rows */
    int width = 0;
    int32_t first[kTile], last[kTile],
        own[kTile];                 /* keys, as in Sight; own is -1 in the lanes beyond the rows */
    int64_t nearest, furthest = -1; /* keys that one of them may see */
    float top[kTile];               /* the largest logit of each row so far, in units */
    float sum[kTile];               /* of the exponentials relative to it */

    Softmax(const Plan &p, int64_t b_, int64_t hkv_, const Scratch &scratch)
        : plan(p), b(b_), hkv(hkv_), s(scratch), kept(p.scale(b, hkv)),
          keeps_products(!p.window.limited && kept.factor == 1.0f), nearest(p.p.n_keys) {
        for (int i = 0; i < kTile; ++i) {
            first[i] = last[i] = own[i] = -1;
            top[i] = -kInf;
            sum[i] = 0.0f;
        }
    }

    /* Takes rows of the list from `row` on, all of them or those that count, until `stop` or as many as
     * `lanes`; returns where others start. */
    int64_t take_rows(int64_t row, int64_t stop, int64_t lanes, bool all) {
        const void *address[kTile] = {};
        for (; row < stop && n < lanes; ++row) {
            const int64_t m = plan.row_start + row % plan.rows();
            if (!all && !plan.row_counts(b, m))
                continue;
            address[n] = plan.query(b, hkv * plan.group + row / plan.rows(), m);
            const Sight at = plan.sight(m, 0);
            nearest = min_of(nearest, at.first);
            furthest = max_of(furthest, at.last);
            first[n] = at.first;
            last[n] = at.last;
            own[n++] = at.own;
        }
        width = static_cast<int>(round_up(n, kLanes));
        if (n > 0)
            pack<Words>(s, address, n, width);
        return row;
    }

    /* Takes in up to kTile keys that count, before those at `next`. Leaves the exponentials, 0 where a row
     * does not see a key, in x[count][width]. */
    void add(const int32_t *keys, int64_t count, const void *next, float *x) {
        Keys all(plan, b, hkv);
        float before[kTile], *const raised = keeps_products ? top : nullptr;
        memcpy(before, top, sizeof(top));
        const Rows rows = are_words<Words>(s) ? all.rows(keys, count, next) : Rows{};
        if (rows.count > 0) {
            multiply<Words>(s, rows, width, x, raised);
        } else {
            const void *address[kTile] = {};
            for (int64_t i = 0; i < count; ++i)
                address[i] = all.at(keys[i]);
            multiply<Words>(s, address, count, next, width, x, raised);
        }
        for (int j = 0; j < width; j += kLanes) {
            if (!keeps_products)
                scale_logits(keys, count, j, x + j, top + j);
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
    void scale_logits(const int32_t *keys, int64_t count, int j, float *x, float *largest) const {
        const VecI from = load<VecI>(first + j), to = load<VecI>(last + j);
        VecF m = load<VecF>(largest);
        for (int64_t i = 0; i < count; ++i) {
            VecF logit = load<VecF>(x + i * width) * kept.factor;
            if (plan.window.limited)
                logit = ((from <= keys[i]) & (to >= keys[i])) ? logit : splat(-kInf);
            store(x + i * width, logit);
            m = larger(logit, m);
        }
        store(largest, m);
    }
};

} // namespace
} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_ROW_LSE_H_ */
