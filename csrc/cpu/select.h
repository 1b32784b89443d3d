/* Selection of one row on the CPU: a handful of comparisons, the same on every instruction set. */
#ifndef ATTN_SAMPLER_CPU_SELECT_H_
#define ATTN_SAMPLER_CPU_SELECT_H_

#include <cstdint>

#include "attn_sampler.h"

namespace attn_sampler {

/* Element (b, c) of a two-dimensional view. */
template <typename T>
T &element(const attn_sampler_tensor &t, int64_t b, int64_t c) {
    return static_cast<T *>(t.data)[b * t.stride[0] + c * t.stride[1]];
}

/* The position of the largest value among the masked ones with a score; -1 if there is none. The lowest
 * position wins ties; NaN ranks last. */
inline int64_t first_largest(const attn_sampler_tensor &value, const attn_sampler_tensor &scores,
                             const attn_sampler_tensor &masked, int64_t b) {
    int64_t best = -1;
    float best_value = 0.0f;
    for (int64_t c = 0; c < masked.shape[1]; ++c) {
        const float score = element<float>(scores, b, c);
        if (element<uint8_t>(masked, b, c) == 0 || score != score)
            continue;
        const float v = element<float>(value, b, c);
        const float ranked = v == v ? v : -__builtin_inff();
        if (best < 0 || ranked > best_value) {
            best = c;
            best_value = ranked;
        }
    }
    return best;
}

/* Row b of selected: see attn_sampler_select_tokens. */
inline void select_row(const attn_sampler_tensor &scores, const attn_sampler_tensor &confidence,
                       const attn_sampler_tensor &masked, int64_t b,
                       const attn_sampler_selection_params &params, const attn_sampler_tensor &selected) {
    const int64_t columns = masked.shape[1];
    const bool parallel = params.rule == ATTN_SAMPLER_RULE_PARALLEL;
    const float tau = static_cast<float>(params.tau);
    auto is_high = [&](int64_t c) { return element<float>(confidence, b, c) >= tau; };
    float theta = -__builtin_inff();
    for (int64_t c = 0; parallel && c < columns; ++c)
        if (element<uint8_t>(masked, b, c) != 0 && !is_high(c) && element<float>(scores, b, c) > theta)
            theta = element<float>(scores, b, c);
    bool any = false;
    for (int64_t c = 0; c < columns; ++c) {
        const bool chosen = parallel && element<uint8_t>(masked, b, c) != 0 && is_high(c) &&
                            element<float>(scores, b, c) > theta;
        element<uint8_t>(selected, b, c) = chosen;
        any = any || chosen;
    }
    if (any)
        return;
    const bool by_confidence = parallel && params.fallback == ATTN_SAMPLER_FALLBACK_CONFIDENCE;
    const int64_t single = first_largest(by_confidence ? confidence : scores, scores, masked, b);
    if (single >= 0)
        element<uint8_t>(selected, b, single) = 1;
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_CPU_SELECT_H_ */
