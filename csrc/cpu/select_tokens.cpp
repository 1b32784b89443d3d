/* Selection on the CPU: a handful of comparisons for each position. */
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "selection.h"

namespace attn_sampler {
namespace {

void select_sequence(const SelectProblem &p, const SelectionRule &rule, int64_t b) {
    const auto masked = [&](int64_t c) { return element(p.masked, b, c) != 0; };
    const auto score = [&](int64_t c) { return element(p.scores, b, c); };
    const auto confidence = [&](int64_t c) { return element(p.confidence, b, c); };
    float theta = kLowest;
    for (int64_t c = 0; rule.is_parallel() && c < p.columns; ++c)
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

/* What becomes of the committed tokens of a sequence. `failing` is room to work in. */
void revise_sequence(const SelectProblem &p, const RevisionRule &rule, int64_t b,
                     std::vector<std::pair<float, int64_t>> &failing) {
    failing.clear();
    for (int64_t c = 0; c < p.columns; ++c) {
        uint8_t &verdict = element(p.revised, b, c) = ATTN_SAMPLER_KEPT;
        const float current = element(p.current, b, c);
        if (element(p.masked, b, c) == 0)
            verdict = rule.verdict(element(p.budget, b, c), element(p.differs, b, c) != 0,
                                   element(p.confidence, b, c), current);
        if (verdict != ATTN_SAMPLER_KEPT)
            failing.emplace_back(rule.rank(element(p.scores, b, c), current), c);
    }
    const auto count = static_cast<int64_t>(failing.size());
    const auto last = failing.begin() + min_of(rule.most, count);
    if (rule.most < count)
        std::partial_sort(failing.begin(), last, failing.end(), [](const auto &x, const auto &y) {
            return SelectionRule::is_before(x.first, x.second, y.first, y.second);
        });
    for (auto at = failing.begin(); at != last; ++at)
        --element(p.budget, b, at->second);
    for (auto at = last; at != failing.end(); ++at)
        element(p.revised, b, at->second) = ATTN_SAMPLER_KEPT;
}

} // namespace

namespace cpu {

int64_t select_tokens(const SelectProblem &p, const attn_sampler_exec &) {
    const SelectionRules rules = selection_rules(p);
    const RevisionRule revision = revision_rule(p.params);
    std::vector<std::pair<float, int64_t>> failing;
    for (int64_t b = 0; b < p.batch; ++b) {
        select_sequence(p, rules.at(b), b);
        if (p.budget.data != nullptr)
            revise_sequence(p, revision, b, failing);
    }
    return 0;
}

} // namespace cpu
} // namespace attn_sampler
