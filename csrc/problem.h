/* Validated problems, as csrc/api.cpp hands them to the kernels of any device. */
#ifndef ATTN_SAMPLER_PROBLEM_H_
#define ATTN_SAMPLER_PROBLEM_H_

#include <cstdint>

#include "arithmetic.h"
#include "attn_sampler.h"
#include "attn_sampler_random.h" /* ATTN_SAMPLER_HD */

/* No function of its own, which the linker might share between files of different instruction sets. */
#define ATTN_SAMPLER_LOCAL __attribute__((always_inline))

namespace attn_sampler {

/* Where a tensor's elements are, strides in elements; without one, the address is null and the strides are 0.
 */
template <typename T, int kDims>
struct View {
    T *data;
    int64_t stride[kDims];
};

/* Internal linkage, as in cpu/simd/simd.h. */
template <typename T>
ATTN_SAMPLER_HD static inline T &element(const View<T, 2> &view, int64_t i, int64_t j) {
    return view.data[i * view.stride[0] + j * view.stride[1]];
}
static constexpr int64_t element_size(int dtype) {
    return dtype == ATTN_SAMPLER_FLOAT32 ? 4 : dtype == ATTN_SAMPLER_FLOAT8_E4M3 ? 1 : 2;
}

/* The pages of a cache in which keys lie: key n of a sequence is row n % size of the page that its table has
 * at n / size. */
struct Pages {
    View<const int32_t, 2> table; /* may be none: a sequence's keys lie together */
    int64_t count;
    int32_t size, shift;
    uint32_t factor; /* n / size is n * factor >> shift for every n below 2^30 */

    void set_size(int64_t keys) {
        size = static_cast<int32_t>(keys);
        for (shift = 30; int64_t{1} << (shift - 30) < keys; ++shift)
            ;
        factor = static_cast<uint32_t>(ceil_div(int64_t{1} << shift, keys));
    }
    ATTN_SAMPLER_HD int64_t index_of(int64_t n) const {
        return static_cast<int64_t>(static_cast<uint64_t>(n) * factor >> shift);
    }
    /* Where the page is that the table has at an index; negative where it has none. */
    ATTN_SAMPLER_HD int64_t page(int64_t b, int64_t index) const {
        const int64_t entry = element(table, b, index);
        return entry < count ? entry : -1;
    }
};

/* By how much key positions are ahead of the keys of sequence b. Kernels count positions as if all sequences
 * ended at the last of `positions`, so that they mean the same for all: position j is key j - ahead there, if
 * that is not negative. */
ATTN_SAMPLER_HD static inline int64_t keys_ahead(const View<const int32_t, 1> &seqlens_k, int64_t positions,
                                                 int64_t b) {
    if (seqlens_k.data == nullptr)
        return 0;
    const int64_t keys = seqlens_k.data[b * seqlens_k.stride[0]];
    return keys < 0 ? positions : keys < positions ? positions - keys : 0;
}

/* One layer's attention and what is wanted of it. q and k have last stride 1. */
struct AttentionProblem {
    int64_t batch, heads, kv_heads, n_rows, n_keys, headdim;
    int dtype;                                 /* attn_sampler_dtype of q and k */
    View<const void, 3> q, k;                  /* batch, head, row; of k in pages, a page for the batch */
    View<const float, 3> softmax_lse;          /* may be none, as what follows and the masks */
    View<const float, 2> q_descale, k_descale; /* none unless dtype is float8 */
    View<const uint8_t, 2> key_mask, query_mask, column_mask;
    View<const int32_t, 1> seqlens_k;
    Pages pages;
    attn_sampler_attention_params params; /* positions as keys_ahead has them */
    View<float, 4> out;                   /* batch, head, row, column; 0 for one that it does not have */
    int num_threads;
};

/* The columns to choose of one layer's. */
struct TopProblem {
    AttentionProblem attention; /* whose out is the device's to place */
    int64_t groups;             /* of heads that share a choice */
    attn_sampler_top_columns_params params;
    View<int64_t, 3> positions; /* batch, group, place */
    View<float, 3> scores;
};

/* The keys that a row may see by where it stands: from `left` before its position to `right` after it. A side
 * without limit has one that no key is beyond. Positions are counted from `query_start` on: rows that are far
 * from all keys are moved next to them, with what they see, so that all sums are small. */
struct Window {
    int64_t query_start, left, right;
    bool limited; /* at a side at least */

    explicit Window(const AttentionProblem &p)
        : query_start(clamp(p.params.query_start, -p.n_rows, p.n_keys)), left(query_start + p.n_rows),
          right(p.n_keys - query_start),
          limited(p.params.causal != 0 || p.params.window_left >= 0 || p.params.window_right >= 0) {
        const int64_t moved = query_start - p.params.query_start;
        if (p.params.window_left >= 0)
            left = clamp(p.params.window_left + moved, -1, left);
        if (p.params.causal != 0 || p.params.window_right >= 0)
            right = clamp((p.params.causal != 0 ? 0 : p.params.window_right) - moved, -1, right);
    }
};

/* One row's value: of its own, or that of all. */
template <typename T>
struct OfRows {
    View<const T, 1> own; /* may be none */
    T all;

    ATTN_SAMPLER_HD ATTN_SAMPLER_LOCAL T at(int64_t b) const {
        return own.data == nullptr ? all : own.data[b * own.stride[0]];
    }
};

/* How a row's tokens are drawn. */
struct Draw {
    uint64_t seed;
    float inverse_temperature; /* 0: none is drawn */
    int32_t top_k;             /* 0: all */
    float top_p;               /* 1: all */
    float least;               /* log(min_p); -inf: all */

    ATTN_SAMPLER_HD ATTN_SAMPLER_LOCAL bool samples() const { return inverse_temperature > 0.0f; }
    ATTN_SAMPLER_HD ATTN_SAMPLER_LOCAL bool truncates() const {
        return top_k > 0 || top_p < 1.0f || least > -__builtin_inff();
    }
};

struct Draws {
    OfRows<int64_t> seed;
    OfRows<int32_t> top_k;
    OfRows<float> temperature, top_p, min_p;
};

/* That of row b. */
template <typename Lane = ScalarLane>
ATTN_SAMPLER_HD ATTN_SAMPLER_LOCAL inline Draw draw_of(const Draws &draws, int64_t b) {
    const float t = draws.temperature.at(b), p = draws.top_p.at(b), m = draws.min_p.at(b);
    const int32_t k = draws.top_k.at(b);
    Draw draw{static_cast<uint64_t>(draws.seed.at(b)), 0.0f, k > 0 ? k : 0, p > 0.0f && p < 1.0f ? p : 1.0f,
              -__builtin_inff()};
    if (t >= 0x1p-120f)
        draw.inverse_temperature = 1.0f / (t < 0x1p126f ? t : 0x1p126f);
    if (m > 0.0f)
        draw.least = -exact_neg_log<Lane>(m < 0x1p-126f ? 0x1p-126f : m < 1.0f ? m : 1.0f);
    return draw;
}

/* How far a logit, times the inverse temperature, is below the largest; neither is NaN. */
ATTN_SAMPLER_HD static inline float distance_below(float top, float scaled) {
    return scaled < top ? scaled - top : 0.0f;
}

/* Whether a token may be drawn that has so much of the mass above it. */
ATTN_SAMPLER_HD static inline bool is_within(float top_p, int64_t above, int64_t mass) {
    return static_cast<double>(above) < static_cast<double>(top_p) * static_cast<double>(mass);
}

struct ConfidenceProblem {
    int64_t batch, positions, vocab;
    int dtype;
    int32_t metric;
    View<const void, 2> logits;
    Draws draws;
    int64_t excluded; /* negative for none */
    int64_t vocab_start;
    View<const uint32_t, 3> bitmask;    /* may be none; batch, position, word */
    View<const int64_t, 2> current_ids; /* may be none, as log_prob and current */
    View<int64_t, 2> token_ids;
    View<float, 2> confidence, log_prob, current;
    int num_threads;
};

/* Whether a token is not excluded, and its bit of the mask is set. */
static inline bool is_present(const ConfidenceProblem &p, int64_t b, int64_t c, int64_t token) {
    const int64_t *const stride = p.bitmask.stride;
    return token != p.excluded &&
           (p.bitmask.data == nullptr ||
            (p.bitmask.data[b * stride[0] + c * stride[1] + token / 32 * stride[2]] >> (token % 32) & 1) !=
                0);
}

struct SelectProblem {
    int64_t batch, columns;
    View<const float, 2> scores, confidence;
    View<const uint8_t, 2> masked; /* select_tokens only */
    View<uint8_t, 2> selected;
    OfRows<int32_t> rule; /* attn_sampler_rule */
    OfRows<float> tau;
    attn_sampler_selection_params params;
    View<int32_t, 2> budget; /* may be none, as what follows: nothing is revised */
    View<uint8_t, 2> revised;
    View<const float, 2> current;
    View<const uint8_t, 2> differs; /* select_tokens only */
};

struct StepProblem {
    const AttentionProblem *layers; /* each accumulates into the scores, which start at 0 */
    int64_t num_layers;
    ConfidenceProblem predict;
    SelectProblem select;
    View<int64_t, 2> tokens; /* [B, C] of the block */
    int64_t mask_token_id;
    const int64_t *row_tokens; /* null, or a row counts only where its token, from here on, is masked; strides
                                  of the tokens */
};

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_PROBLEM_H_ */
