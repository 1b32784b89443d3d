/* What is promised of a valid call. */
#ifndef ATTN_SAMPLER_TESTS_JUDGE_H_
#define ATTN_SAMPLER_TESTS_JUDGE_H_

#include "random_call.h"

namespace {

thread_local uint64_t this_seed;

[[noreturn]] void fail(const std::string &what) {
    fprintf(stderr, "%s\n", what.c_str());
    abort();
}

void require(bool holds, const char *what) {
    if (!holds)
        fail(what);
}

template <typename T>
std::vector<T> values(const attn_sampler_tensor *view, const Call &call) {
    for (const Tensor &t : call.tensors)
        if (&t.view == view)
            return t.values<T>();
    return {};
}

void check_attention(const Call &call) {
    const attn_sampler_attention_params &a = call.params.attention;
    const bool is_step = call.function == kDecodeStep;
    const auto heads = static_cast<double>(call.layer[0].q->shape[1]);
    const auto rows = static_cast<double>(call.layer[0].q->shape[2]);
    const bool sums_rows = call.function == kColumnScores && a.reduction == ATTN_SAMPLER_REDUCTION_SUM;
    double most =
        is_step ? static_cast<double>(call.rows) : (a.per_head ? 1 : heads) * (sums_rows ? rows : 1);
    for (int i = 0; i < call.num_layers; ++i) /* what is given need not be the logits' own */
        most = call.layer[i].softmax_lse == nullptr ? most : HUGE_VAL;
    const double least = !is_step && a.accumulate ? 0.5 : 0.0;
    for (const float x : values<float>(is_step ? call.scores : call.out, call))
        require(!call.plain || (std::isfinite(x) && x >= least && x <= least + most * 1.0001 + 1e-5),
                "attention that cannot be");
}

/* Keys of the columns, each once, none after what is not there, and scores that fall after what is kept. */
void check_choice(const Call &call) {
    const attn_sampler_attention_params &a = call.params.attention;
    const attn_sampler_top_columns_params &top = call.top;
    const std::vector<int64_t> positions = values<int64_t>(call.positions, call);
    const std::vector<float> scores = values<float>(call.scores, call);
    const int64_t last = a.columns.stop + call.end;
    for (size_t first = 0; first < positions.size(); first += static_cast<size_t>(top.count)) {
        std::vector<int64_t> chosen;
        for (size_t i = first; i < first + static_cast<size_t>(top.count); ++i) {
            const bool is_there = positions[i] >= 0;
            const auto place = static_cast<int64_t>(i - first);
            if (!is_there)
                require(positions[i] == -1 && scores[i] == -HUGE_VALF, "a score of no column");
            require(!is_there || (positions[i] < last && (call.end > 0 || positions[i] >= a.columns.start)),
                    "a key of no column");
            require(!is_there || place == static_cast<int64_t>(chosen.size()), "a column after none");
            require(!call.plain || !is_there || scores[i] >= 0.0f, "a score that cannot be");
            if (is_there && place > top.sinks + top.recent)
                require(scores[i] < scores[i - 1] || std::isnan(scores[i]) ||
                            (scores[i] == scores[i - 1] && positions[i] > positions[i - 1]),
                        "columns out of order");
            if (is_there)
                chosen.push_back(positions[i]);
        }
        std::sort(chosen.begin(), chosen.end());
        require(std::adjacent_find(chosen.begin(), chosen.end()) == chosen.end(), "a column twice");
    }
}

void check_confidence(const Call &call) {
    const attn_sampler_sampling_params &s = call.params.sampling;
    const int64_t excluded = call.function == kDecodeStep ? call.params.mask_token_id : s.exclude_token_id;
    for (const int64_t token : values<int64_t>(call.token_ids, call))
        require(token >= 0 && token < call.vocab && token != excluded, "a token that cannot be");
    const bool is_entropy = s.metric == ATTN_SAMPLER_METRIC_ENTROPY; /* negated */
    const double most = is_entropy ? 0.0 : 1.0;
    const double least = is_entropy ? -std::log(static_cast<double>(call.vocab))
                         : s.metric == ATTN_SAMPLER_METRIC_PROBABILITY ? 0.0
                                                                       : -1.0;
    for (const float x : values<float>(call.confidence, call))
        require(!call.plain || (x >= least - 1e-4 && x <= most + 1e-4), "a confidence that cannot be");
    const bool is_step = call.function == kDecodeStep;
    for (const float x : values<float>(is_step ? call.revision.log_prob : call.log_prob, call))
        require(!call.plain || (std::isfinite(x) && x <= 1e-4), "a logarithm that cannot be");
    const std::vector<float> current = values<float>(is_step ? call.revision.current : call.current, call);
    const std::vector<int64_t> ids = values<int64_t>(call.current_ids, call);
    for (size_t i = 0; call.plain && i < current.size(); ++i) {
        const bool may_be_none = ids.empty() || ids[i] < 0 || ids[i] >= call.vocab;
        const bool is_likely = current[i] >= 0.0f && current[i] <= 1.0001f;
        require(is_likely ? ids.empty() || !may_be_none : may_be_none && std::isnan(current[i]),
                "a probability that cannot be");
        require(ids.empty() || ids[i] != excluded || may_be_none || current[i] == 0.0f,
                "the excluded token is likely");
    }
}

/* The rule, as attn_sampler.h words it. */
void check_selection(const Call &call, const std::vector<uint8_t> &masked) {
    const attn_sampler_selection_params &s = call.params.selection;
    const std::vector<float> scores = values<float>(call.scores, call);
    const std::vector<float> confidence = values<float>(call.confidence, call);
    const std::vector<uint8_t> selected = values<uint8_t>(call.selected, call);
    const std::vector<int32_t> rules = values<int32_t>(s.rules, call);
    const std::vector<float> taus = values<float>(s.taus, call);
    bool parallel, threshold, by_score;
    float tau;
    const auto is_high = [&](size_t i) { return confidence[i] >= tau; };
    const auto rank = [&](size_t i) { return std::fmax(by_score ? scores[i] : confidence[i], -HUGE_VALF); };
    std::vector<uint8_t> expected(selected.size());
    const size_t columns = static_cast<size_t>(call.selected->shape[1]);
    for (size_t first = 0; first < selected.size(); first += columns) {
        const int32_t rule = rules.empty() ? s.rule : rules[first / columns];
        tau = taus.empty() ? static_cast<float>(s.tau) : taus[first / columns];
        threshold = rule == ATTN_SAMPLER_RULE_THRESHOLD;
        parallel = !threshold && rule != ATTN_SAMPLER_RULE_SEQUENTIAL;
        by_score = rule == ATTN_SAMPLER_RULE_SEQUENTIAL || s.fallback == ATTN_SAMPLER_FALLBACK_SCORE;
        float theta = -HUGE_VALF;
        size_t fallback = SIZE_MAX;
        for (size_t i = first; i < first + columns; ++i) {
            if (masked[i] && !is_high(i))
                theta = std::fmax(theta, scores[i]);
            const bool may_be = !std::isnan(scores[i]) || (threshold && !by_score);
            if (masked[i] && may_be && (fallback == SIZE_MAX || rank(i) > rank(fallback)))
                fallback = i;
        }
        bool any = false;
        for (size_t i = first; i < first + columns; ++i)
            any = (expected[i] = masked[i] && is_high(i) && (threshold || (parallel && scores[i] > theta))) ||
                  any;
        if (!any && fallback != SIZE_MAX)
            expected[fallback] = 1;
    }
    require(selected == expected, "a wrong selection");
}

/* What is revised, as attn_sampler.h words it, of what was before. */
void check_revision(const Call &call, const std::vector<uint8_t> &masked, const std::vector<uint8_t> &differs,
                    std::vector<int32_t> budget) {
    const attn_sampler_selection_params &s = call.params.selection;
    const std::vector<float> scores = values<float>(call.scores, call);
    const std::vector<float> confidence = values<float>(call.confidence, call);
    const std::vector<float> current = values<float>(call.revision.current, call);
    std::vector<uint8_t> expected(budget.size());
    const auto rank = [&](size_t i) {
        const float doubt = 1.0f - current[i];
        return std::fmax(s.revision_order == ATTN_SAMPLER_REVISION_ORDER_SCORE   ? scores[i]
                         : s.revision_order == ATTN_SAMPLER_REVISION_ORDER_DOUBT ? doubt
                                                                                 : doubt * scores[i],
                         -HUGE_VALF);
    };
    const size_t columns = static_cast<size_t>(call.selected->shape[1]);
    for (size_t first = 0; first < budget.size(); first += columns) {
        std::vector<size_t> failing;
        for (size_t i = first; i < first + columns; ++i) {
            if (masked[i] || budget[i] <= 0)
                continue;
            if (differs[i] && confidence[i] >= static_cast<float>(s.replace_tau))
                expected[i] = ATTN_SAMPLER_REPLACED;
            else if (current[i] < static_cast<float>(s.remask_tau))
                expected[i] = ATTN_SAMPLER_REMASKED;
            if (expected[i] != ATTN_SAMPLER_KEPT)
                failing.push_back(i);
        }
        std::stable_sort(failing.begin(), failing.end(),
                         [&](size_t x, size_t y) { return rank(x) > rank(y); });
        for (size_t n = 0; n < failing.size(); ++n) {
            if (static_cast<int64_t>(n) < s.max_revisions)
                --budget[failing[n]];
            else
                expected[failing[n]] = ATTN_SAMPLER_KEPT;
        }
    }
    require(values<uint8_t>(call.revision.revised, call) == expected, "a wrong revision");
    require(values<int32_t>(call.revision.budget, call) == budget, "a wrong budget");
}

void check_step(const Call &call, const std::vector<int64_t> &tokens, const std::vector<int32_t> &budget) {
    const std::vector<int64_t> now = values<int64_t>(call.tokens, call),
                               ids = values<int64_t>(call.token_ids, call);
    const std::vector<uint8_t> selected = values<uint8_t>(call.selected, call);
    const std::vector<uint8_t> revised = values<uint8_t>(call.revision.revised, call);
    std::vector<uint8_t> masked, differs;
    std::vector<int64_t> expected = tokens;
    const int64_t n_tokens = call.tokens->shape[1];
    for (size_t i = 0; i < tokens.size(); ++i) {
        const int64_t position = static_cast<int64_t>(i) % n_tokens;
        if (position < call.params.block.start || position >= call.params.block.stop)
            continue;
        const size_t c = masked.size();
        const uint8_t verdict = call.revises ? revised[c] : uint8_t{ATTN_SAMPLER_KEPT};
        if (selected[c] || verdict == ATTN_SAMPLER_REPLACED)
            expected[i] = ids[c];
        else if (verdict == ATTN_SAMPLER_REMASKED)
            expected[i] = call.params.mask_token_id;
        masked.push_back(tokens[i] == call.params.mask_token_id);
        differs.push_back(tokens[i] != ids[c]);
    }
    check_selection(call, masked);
    if (call.revises)
        check_revision(call, masked, differs, budget);
    require(now == expected, "wrong tokens");
}

/* Nothing but elements of outputs differs from what was there before. */
void check_writes(const Call &call, const std::vector<std::vector<unsigned char>> &before) {
    for (size_t i = 0; i < before.size(); ++i) {
        const Tensor &t = call.tensors[i];
        std::vector<unsigned char> expected = before[i];
        if (t.role == Role::output)
            t.each([&](const unsigned char *at) {
                std::copy_n(at, element_size(t.view.dtype), expected.data() + (at - t.memory.get()));
            });
        require(std::equal(expected.begin(), expected.end(), t.memory.get()), "a write beside the outputs");
    }
}

void check_valid(Call &call) {
    const auto before = call.bytes();
    const std::vector<int64_t> tokens = values<int64_t>(call.tokens, call);
    const std::vector<int32_t> budget = values<int32_t>(call.revision.budget, call);
    if (call.run() != ATTN_SAMPLER_OK)
        fail(std::string("a valid call was refused: ") + attn_sampler_last_error());
    check_writes(call, before);
    if (call.out != nullptr || (call.function == kDecodeStep && call.num_layers > 0))
        check_attention(call);
    if (call.function == kTopColumns)
        check_choice(call);
    if (call.token_ids != nullptr)
        check_confidence(call);
    if (call.function == kSelectTokens)
        check_selection(call, values<uint8_t>(call.masked, call));
    if (call.function == kSelectTokens && call.revises)
        check_revision(call, values<uint8_t>(call.masked, call), values<uint8_t>(call.revision.differs, call),
                       budget);
    if (call.function == kDecodeStep)
        check_step(call, tokens, budget);
    const auto after = call.bytes();
    call.restore(before);
    call.exec.num_threads = call.exec.num_threads % 3 + 1;
    require(call.run() == ATTN_SAMPLER_OK && call.bytes() == after, "other bits with other threads");
}

} // namespace

#endif /* ATTN_SAMPLER_TESTS_JUDGE_H_ */
