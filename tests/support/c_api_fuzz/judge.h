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

void check_attention(const Call &c) {
    const attn_sampler_attention_params &a = c.params.attention;
    const bool is_step = c.function == kDecodeStep;
    double most = static_cast<double>(c.rows);
    for (int i = 0; i < c.num_layers; ++i)
        most = c.layer[i].softmax_lse == nullptr ? most : HUGE_VAL;
    if (!is_step &&
        (a.per_head || c.function == kAttentionMap || a.reduction != ATTN_SAMPLER_REDUCTION_SUM)) {
        const bool summed = c.function == kColumnScores && a.reduction == ATTN_SAMPLER_REDUCTION_SUM;
        const auto heads = static_cast<double>(c.layer[0].q->shape[1]);
        const double entries = summed ? static_cast<double>(c.layer[0].q->shape[2]) : 1.0;
        most = std::min(most, (a.per_head ? 1.0 : heads) * entries) + (most == HUGE_VAL ? HUGE_VAL : 0.0);
    }
    const double least = !is_step && a.accumulate ? 0.5 : 0.0;
    for (const float x : values<float>(is_step ? c.scores : c.out, c))
        require(!c.plain || (std::isfinite(x) && x >= least && x <= least + most * 1.0001 + 1e-5),
                "attention that cannot be");
}

void check_confidence(const Call &c) {
    const attn_sampler_sampling_params &s = c.params.sampling;
    const int64_t excluded = c.function == kDecodeStep ? c.params.mask_token_id : s.exclude_token_id;
    for (const int64_t token : values<int64_t>(c.token_ids, c))
        require(token >= 0 && token < c.vocab && token != excluded, "a token that cannot be");
    const double entropy = std::log(static_cast<double>(c.vocab));
    const double least = s.metric == ATTN_SAMPLER_METRIC_PROBABILITY ? 0.0
                         : s.metric == ATTN_SAMPLER_METRIC_MARGIN    ? -1.0
                                                                     : -entropy;
    for (const float x : values<float>(c.confidence, c))
        require(!c.plain ||
                    (x >= least - 1e-4 && x <= (s.metric == ATTN_SAMPLER_METRIC_ENTROPY ? 0 : 1) + 1e-4),
                "a confidence that cannot be");
}

/* The rule, as attn_sampler.h words it. */
void check_selection(const Call &c, const std::vector<uint8_t> &masked) {
    const std::vector<float> scores = values<float>(c.scores, c), confidence = values<float>(c.confidence, c);
    const std::vector<uint8_t> selected = values<uint8_t>(c.selected, c);
    const size_t columns = static_cast<size_t>(c.selected->shape[1]);
    const bool parallel = c.params.selection.rule == ATTN_SAMPLER_RULE_PARALLEL;
    const bool by_score = !parallel || c.params.selection.fallback == ATTN_SAMPLER_FALLBACK_SCORE;
    for (size_t first = 0; first < selected.size(); first += columns) {
        std::vector<uint8_t> expected(columns);
        float theta = -HUGE_VALF, best = -HUGE_VALF;
        size_t fallback = columns;
        for (size_t c_ = 0; c_ < columns; ++c_) {
            const size_t i = first + c_;
            if (!masked[i])
                continue;
            if (!(confidence[i] >= static_cast<float>(c.params.selection.tau)))
                theta = std::fmax(theta, scores[i]);
            const float rank = std::fmax(by_score ? scores[i] : confidence[i], -HUGE_VALF);
            if (!std::isnan(scores[i]) && (fallback == columns || rank > best)) {
                fallback = c_;
                best = rank;
            }
        }
        for (size_t i = 0; i < columns; ++i)
            expected[i] = parallel && masked[first + i] && scores[first + i] > theta &&
                          confidence[first + i] >= static_cast<float>(c.params.selection.tau);
        if (std::count(expected.begin(), expected.end(), 1) == 0 && fallback < columns)
            expected[fallback] = 1;
        require(std::equal(expected.begin(), expected.end(), selected.begin() + first), "a wrong selection");
    }
}

void check_step(const Call &c, const std::vector<int64_t> &tokens) {
    const std::vector<int64_t> now = values<int64_t>(c.tokens, c), ids = values<int64_t>(c.token_ids, c);
    const std::vector<uint8_t> selected = values<uint8_t>(c.selected, c);
    std::vector<uint8_t> masked;
    std::vector<int64_t> expected = tokens;
    const int64_t n_tokens = c.tokens->shape[1];
    for (size_t i = 0; i < tokens.size(); ++i) {
        const int64_t position = static_cast<int64_t>(i) % n_tokens;
        if (position < c.params.block.start || position >= c.params.block.stop)
            continue;
        if (selected[masked.size()])
            expected[i] = ids[masked.size()];
        masked.push_back(tokens[i] == c.params.mask_token_id);
    }
    check_selection(c, masked);
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
    if (call.run() != ATTN_SAMPLER_OK)
        fail(std::string("a valid call was refused: ") + attn_sampler_last_error());
    check_writes(call, before);
    if (call.out != nullptr || (call.function == kDecodeStep && call.num_layers > 0))
        check_attention(call);
    if (call.token_ids != nullptr)
        check_confidence(call);
    if (call.function == kSelectTokens)
        check_selection(call, values<uint8_t>(call.masked, call));
    if (call.function == kDecodeStep)
        check_step(call, tokens);
    const auto after = call.bytes();
    call.restore(before);
    call.exec.num_threads = call.exec.num_threads % 3 + 1;
    require(call.run() == ATTN_SAMPLER_OK && call.bytes() == after, "other bits with other threads");
}

} // namespace

#endif /* ATTN_SAMPLER_TESTS_JUDGE_H_ */
