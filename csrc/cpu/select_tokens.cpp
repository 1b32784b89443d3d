/* Selection on the CPU: a handful of comparisons for each position. */
#include "cpu/kernels.h"
#include "selection.h"

namespace attn_sampler {
namespace {

void select_sequence(const SelectProblem &p, const SelectionRule &rule, int64_t b) {
    const auto masked = [&](int64_t c) { return element(p.masked, b, c) != 0; };
    const auto score = [&](int64_t c) { return element(p.scores, b, c); };
    const auto confidence = [&](int64_t c) { return element(p.confidence, b, c); };
    float theta = kLowest;
    for (int64_t c = 0; rule.parallel && c < p.columns; ++c)
        if (masked(c) && !rule.is_confident(confidence(c)) && score(c) > theta)
            theta = score(c);
    bool any = false;
    for (int64_t c = 0; c < p.columns; ++c) {
        const bool passes = masked(c) && rule.passes(score(c), confidence(c), theta);
        element(p.selected, b, c) = passes;
        any = any || passes;
    }
    int64_t best = -1;
    float best_rank = kLowest;
    for (int64_t c = 0; !any && c < p.columns; ++c) {
        if (!masked(c) || !rule.is_candidate(score(c)))
            continue;
        const float rank = rule.rank(score(c), confidence(c));
        if (best < 0 || rule.is_before(rank, c, best_rank, best)) {
            best = c;
            best_rank = rank;
        }
    }
    if (best >= 0)
        element(p.selected, b, best) = 1;
}

} // namespace

namespace cpu {

int64_t select_tokens(const SelectProblem &p, const attn_sampler_exec &) {
    const SelectionRule rule = selection_rule(p.params);
    for (int64_t b = 0; b < p.batch; ++b)
        select_sequence(p, rule, b);
    return 0;
}

} // namespace cpu
} // namespace attn_sampler
