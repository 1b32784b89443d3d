/* A whole step on the CPU: each kernel in turn, then the commit. */
#include <cstddef>
#include <new>
#include <vector>

#include "cpu/kernels.h"

namespace attn_sampler {
namespace {

/* Which of these tokens, [batch, count], are the mask token and kept by the other mask, if there is one. */
std::vector<uint8_t> where_masked(const StepProblem &step, const int64_t *first_token, int64_t count,
                                  const View<const uint8_t, 2> &kept) {
    const View<const int64_t, 2> tokens = {first_token, {step.tokens.stride[0], step.tokens.stride[1]}};
    std::vector<uint8_t> masked(static_cast<size_t>(step.select.batch * count));
    for (int64_t b = 0; b < step.select.batch; ++b)
        for (int64_t i = 0; i < count; ++i)
            masked[static_cast<size_t>(b * count + i)] = element(tokens, b, i) == step.mask_token_id &&
                                                         (kept.data == nullptr || element(kept, b, i) != 0);
    return masked;
}

void require_memory(bool done) {
    if (!done)
        throw std::bad_alloc();
}

} // namespace

namespace cpu {

int64_t decode_step(const StepProblem &step, const attn_sampler_exec &exec) {
    SelectProblem select = step.select;
    if (select.batch == 0)
        return 0;
    const std::vector<uint8_t> masked = where_masked(step, step.tokens.data, select.columns, {});
    select.masked = {masked.data(), {select.columns, 1}};
    const bool revises = select.budget.data != nullptr;
    std::vector<uint8_t> differs(revises ? masked.size() : 0);
    std::vector<uint8_t> rows;
    if (step.row_tokens != nullptr) /* all layers have the same rows and query mask */
        rows = where_masked(step, step.row_tokens, step.layers[0].n_rows, step.layers[0].query_mask);

    /* Outputs are written from here on; the tokens last. */
    require_memory(cpu_kernels().token_confidence(step.predict));
    for (int64_t i = 0; i < step.num_layers; ++i) {
        AttentionProblem layer = step.layers[i];
        layer.params.accumulate = i > 0;
        if (step.row_tokens != nullptr)
            layer.query_mask = {rows.data(), {layer.n_rows, 1}};
        require_memory(cpu_kernels().column_scores(layer));
    }
    const auto predicted = [&](int64_t b, int64_t c) { return element(step.predict.token_ids, b, c); };
    for (int64_t b = 0; revises && b < select.batch; ++b)
        for (int64_t c = 0; c < select.columns; ++c)
            differs[static_cast<size_t>(b * select.columns + c)] =
                element(step.tokens, b, c) != predicted(b, c);
    select.differs = {differs.data(), {select.columns, 1}};
    select_tokens(select, exec);
    for (int64_t b = 0; b < select.batch; ++b)
        for (int64_t c = 0; c < select.columns; ++c) {
            const uint8_t verdict = revises ? element(select.revised, b, c) : ATTN_SAMPLER_KEPT;
            if (element(select.selected, b, c) != 0 || verdict == ATTN_SAMPLER_REPLACED)
                element(step.tokens, b, c) = predicted(b, c);
            else if (verdict == ATTN_SAMPLER_REMASKED)
                element(step.tokens, b, c) = step.mask_token_id;
        }
    return 0;
}

} // namespace cpu
} // namespace attn_sampler
