/* The rule by which masked positions are committed (see attn_sampler_select_tokens), in terms of one or two
 * positions. How positions are walked is the device's own affair. */
#ifndef ATTN_SAMPLER_SELECTION_H_
#define ATTN_SAMPLER_SELECTION_H_

#include "attn_sampler.h"
#include "attn_sampler_random.h" /* ATTN_SAMPLER_HD */

namespace attn_sampler {

constexpr float kLowest = -__builtin_inff();

struct SelectionRule {
    bool parallel,
        by_confidence; /* by_confidence: the fallback commits the largest of it, not of the scores */
    float tau;

    ATTN_SAMPLER_HD bool is_confident(float confidence) const { return confidence >= tau; }

    /* Whether a masked position is committed, given theta: the largest score, from kLowest on, of those that
     * are not confident. */
    ATTN_SAMPLER_HD bool passes(float score, float confidence, float theta) const {
        return parallel && is_confident(confidence) && score > theta;
    }

    /* Whether the fallback may commit a masked position, and what it is ranked by. */
    ATTN_SAMPLER_HD static bool is_candidate(float score) { return score == score; }
    ATTN_SAMPLER_HD float rank(float score, float confidence) const {
        const float value = by_confidence ? confidence : score;
        return value == value ? value : kLowest;
    }

    /* Whether the fallback prefers the candidate of this rank and position to another. */
    template <typename Position>
    ATTN_SAMPLER_HD static bool is_before(float rank, Position position, float other,
                                          Position other_position) {
        return rank > other || (rank == other && position < other_position);
    }
};

inline SelectionRule selection_rule(const attn_sampler_selection_params &params) {
    const bool parallel = params.rule == ATTN_SAMPLER_RULE_PARALLEL;
    return {parallel, parallel && params.fallback == ATTN_SAMPLER_FALLBACK_CONFIDENCE,
            static_cast<float>(params.tau)};
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_SELECTION_H_ */
