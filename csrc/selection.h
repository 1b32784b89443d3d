/* The rules by which masked positions are committed and others revised (see attn_sampler_select_tokens), in
 * terms of one or two positions. How positions are walked is the device's own affair. */
#ifndef ATTN_SAMPLER_SELECTION_H_
#define ATTN_SAMPLER_SELECTION_H_

#include "problem.h"

namespace attn_sampler {

constexpr float kLowest = -__builtin_inff();

struct SelectionRule {
    int32_t rule;
    bool by_confidence; /* the fallback commits the largest of it, not of the scores */
    float tau;

    ATTN_SAMPLER_HD bool is_parallel() const { return rule == ATTN_SAMPLER_RULE_PARALLEL; }

    ATTN_SAMPLER_HD bool is_confident(float confidence) const { return confidence >= tau; }

    /* Whether a masked position is committed, given theta: the largest score, from kLowest on, of those that
     * are not confident; of a rule that is_parallel() only. */
    ATTN_SAMPLER_HD bool passes(float score, float confidence, float theta) const {
        return rule != ATTN_SAMPLER_RULE_SEQUENTIAL && is_confident(confidence) &&
               (score > theta || !is_parallel());
    }

    /* Whether the fallback may commit a masked position, and what it is ranked by. */
    ATTN_SAMPLER_HD bool is_candidate(float score) const {
        return score == score || (rule == ATTN_SAMPLER_RULE_THRESHOLD && by_confidence);
    }
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

/* The rule of each sequence. */
struct SelectionRules {
    OfRows<int32_t> rule;
    OfRows<float> tau;
    int32_t fallback;

    ATTN_SAMPLER_HD SelectionRule at(int64_t b) const {
        const int32_t own = rule.at(b);
        const bool by_confidence =
            own != ATTN_SAMPLER_RULE_SEQUENTIAL && fallback == ATTN_SAMPLER_FALLBACK_CONFIDENCE;
        const bool is_known = own == ATTN_SAMPLER_RULE_SEQUENTIAL || own == ATTN_SAMPLER_RULE_THRESHOLD;
        return {is_known ? own : int32_t{ATTN_SAMPLER_RULE_PARALLEL}, by_confidence, tau.at(b)};
    }
};

inline SelectionRules selection_rules(const SelectProblem &p) { return {p.rule, p.tau, p.params.fallback}; }

/* The rule by which committed tokens are taken back. */
struct RevisionRule {
    float replace_tau, remask_tau;
    int32_t order;
    int64_t most; /* positions of a sequence */

    /* What becomes of a committed token with this budget, if it is among the first: attn_sampler_verdict. */
    ATTN_SAMPLER_HD uint8_t verdict(int32_t budget, bool differs, float confidence, float current) const {
        if (budget <= 0)
            return ATTN_SAMPLER_KEPT;
        if (differs && confidence >= replace_tau)
            return ATTN_SAMPLER_REPLACED;
        return current < remask_tau ? ATTN_SAMPLER_REMASKED : ATTN_SAMPLER_KEPT;
    }

    /* What those that fail are ranked by, as SelectionRule::is_before has it. */
    ATTN_SAMPLER_HD float rank(float score, float current) const {
        const float doubt = 1.0f - current;
        const float value = order == ATTN_SAMPLER_REVISION_ORDER_SCORE   ? score
                            : order == ATTN_SAMPLER_REVISION_ORDER_DOUBT ? doubt
                                                                         : doubt * score;
        return value == value ? value : kLowest;
    }
};

inline RevisionRule revision_rule(const attn_sampler_selection_params &params) {
    return {static_cast<float>(params.replace_tau), static_cast<float>(params.remask_tau),
            params.revision_order, params.max_revisions};
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_SELECTION_H_ */
